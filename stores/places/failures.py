"""What went wrong at an object store, as one of Python's own errors.

A service's answer and obstore's messages may hold an endpoint with a password in it, an access key, or a session token. Of what
they say only the kind, the status and the service's error code are passed on.
"""

from __future__ import annotations

import re
from io import UnsupportedOperation

from obstore import exceptions

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_KINDS: tuple[tuple[type[Exception], type[OSError]], ...] = (
    (FileNotFoundError, FileNotFoundError),
    (exceptions.AlreadyExistsError, FileExistsError),
    (exceptions.PermissionDeniedError, PermissionError),
    (exceptions.UnauthenticatedError, PermissionError),
    (exceptions.NotSupportedError, UnsupportedOperation),
    (NotImplementedError, UnsupportedOperation),
)
_BY_STATUS: dict[str, type[OSError]] = {"404": FileNotFoundError, "429": ConnectionError, "501": UnsupportedOperation}
_OTHERWISE: dict[type[OSError], str] = {
    TimeoutError: "the service did not answer in time",
    ConnectionError: "the connection broke off",
    UnsupportedOperation: "the service does not do this",
}


def failure(error: Exception, path: str, root: str) -> OSError:
    """The error to raise in place of obstore's: FileNotFoundError, FileExistsError, PermissionError, TimeoutError, ConnectionError
    (the service fails, or cannot be reached), UnsupportedOperation or plain OSError.
    """
    text = str(error)
    status = _first(_STATUS, text)
    kind = next((ours for theirs, ours in _KINDS if isinstance(error, theirs)), None) or _kind(text, status)
    return kind(f"{path or 'the run'}: {_reason(kind, text, status)} ({root})")


def _kind(text: str, status: str) -> type[OSError]:
    if "169.254.169.254" in text:  # asked for credentials when there are no others; machines outside of the cloud have none
        return PermissionError
    if "kind: Timeout" in text or "TimedOut" in text:
        return TimeoutError
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return OSError if status[:1] in ("3", "4") else ConnectionError


def _reason(kind: type[OSError], text: str, status: str) -> str:
    if "169.254.169.254" in text:
        return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give storage_options"
    if status:
        return f"the service answered {' '.join(filter(None, (status, _first(_CODE, text))))}"
    if "redirect" in text.lower():
        return "the service answered with a redirection; is the region of the bucket right?"
    if "kind: Connect" in text:
        return "the service cannot be reached"
    return _OTHERWISE.get(kind, "the request failed")


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""
