"""A real S3 server on loopback, and in front of it a proxy that makes requests fail."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

BUCKET = "tape-tests"
KEY, SECRET, TOKEN = "AKIACANARYKEYID", "canary/secret+access/key", "canary-session-token"
ANSWERS = {"500": "InternalError", "503": "SlowDown", "403": "ExpiredToken", "409": "ConditionalRequestConflict"}


@contextmanager
def moto() -> Iterator[int]:
    """moto's S3 server in a process of its own; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    few = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "7"}  # per answer to a list
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=few) as server:
        try:
            _wait_for(port, server)
            _ask(
                port,
                "PUT",
                f"/{BUCKET}",
                b"",
                {"Authorization": "AWS4-HMAC-SHA256 Credential=k/20200101/us-east-1/s3/aws4_request"},
            )
            yield port
        finally:
            server.terminate()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise RuntimeError("moto's server did not start")


def _ask(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, headers)
    found = connection.getresponse()
    answer = found.read()
    connection.close()
    return found.status, dict(found.getheaders()), answer


@dataclass
class Fault:
    """What happens to the next `times` requests of a kind (PUT, GET, LIST, HEAD, POST) whose path holds `match`."""

    kind: str
    request: str
    match: str
    times: int


@dataclass
class Traffic:
    """What went through a proxy, and what is to fail."""

    port: int
    target: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # bytes of answers, by kind of request
    drops: set[str] = field(default_factory=set)  # headers of requests that are left out
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def fail(self, kind: str, request: str, match: str = "", times: int = 1) -> None:
        """Make requests fail.

        500, 503, 403, 409: that answer, and nothing is done. stall: no answer. reset: the connection breaks half-way through the
        body. lost: done, but the connection breaks before the answer. gone: done, but the answer is 404.
        """
        self.faults.append(Fault(kind, request, match, times))

    def take(self, request: str, path: str) -> str | None:
        """The fault of this request, if it has one."""
        with self.lock:
            self.requests.append((request, path))
            for fault in self.faults:
                if fault.times and fault.request == request and fault.match in path:
                    fault.times -= 1
                    return fault.kind
        return None

    def count(self, request: str, match: str = "") -> int:
        """Requests of a kind so far."""
        return sum(kind == request and match in path for kind, path in self.requests)

    def clear(self) -> None:
        """Forget what was seen, and all faults."""
        self.faults, self.requests, self.sent, self.drops = [], [], Counter(), set()


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def _forward(self) -> None:
        traffic = self.server.traffic
        kind = "LIST" if self.command == "GET" and "list-type=2" in urlsplit(self.path).query else self.command
        fault = traffic.take(kind, unquote(self.path))
        length = int(self.headers.get("Content-Length", 0))
        if fault == "reset" and self.command != "GET":
            self.rfile.read(length // 2)
            return self._reset()
        body = self.rfile.read(length)
        if fault == "stall":
            traffic.over.wait(60)
            return self._reset()
        if fault in ANSWERS:
            return self._answer(int(fault), {}, f"<Error><Code>{ANSWERS[fault]}</Code><Token-0>{TOKEN}</Token-0></Error>".encode())
        dropped = {"connection", *traffic.drops}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        status, found, answer = _ask(traffic.target, self.command, self.path, body, headers)
        if fault == "lost":
            return self._reset()
        if fault == "gone":
            return self._answer(404, {}, b"<Error><Code>NoSuchUpload</Code></Error>")
        traffic.sent[kind] += len(answer)
        self._answer(status, found, answer, cut=fault == "reset")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header(
            "Content-Length", headers.get("Content-Length", "") if self.command == "HEAD" and headers else str(len(body))
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """Close the connection so that the other side sees a reset."""
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.traffic = Traffic(self.server_port, target)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is no error of the server."""


@contextmanager
def proxy(target: int) -> Iterator[Traffic]:
    """A proxy in front of a server."""
    with _Proxy(target) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.traffic
        finally:
            server.traffic.over.set()
            server.shutdown()
            thread.join()


def options(port: int, *, patience: float = 10, **more: Any) -> dict[str, Any]:
    """`storage_options` for a server on loopback; requests wait so many seconds, and are repeated four times within twice that."""
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=50), "base": 2}
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "access_key_id": KEY,
        "secret_access_key": SECRET,
        "session_token": TOKEN,
        "client_options": {"allow_http": True, "timeout": f"{int(patience * 1000)}ms"},
        "retry_config": {"max_retries": 4, "retry_timeout": timedelta(seconds=2 * patience), "backoff": backoff},
        **more,
    }


def everything(error: BaseException | None) -> str:
    """Whatever an exception and those it came from would show."""
    if error is None:
        return ""
    shown = "".join(traceback.format_exception(error))
    return "\n".join([shown, str(error), repr(error), repr(error.args), everything(error.__cause__), everything(error.__context__)])
