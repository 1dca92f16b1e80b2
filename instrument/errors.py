"""Errors of instrumenting and recording.

InstrumentError
├── SiteNotFoundError (KeyError)        a pattern that matches nothing, or a site that was never reached
├── LayoutError (ValueError)            which axis is what cannot be told
├── BatchError (ValueError)             ids, labels, mask or tokens do not fit the batch
├── ForwardError (RuntimeError)         no forward, or one too many, in a batch context
├── AttentionError (RuntimeError)       attention that was not seen, or that what was seen does not explain
├── SessionError (RuntimeError)         recorders of several processes that nothing connects
├── CompiledModelError (RuntimeError)   hooks would be ignored by a model that is already compiled
└── UnsupportedModelError (TypeError)   a wrapper that cannot be recorded
"""


class InstrumentError(Exception):
    """Anything that keeps a model from being recorded."""


class SiteNotFoundError(InstrumentError, KeyError):
    """A pattern that matches nothing, or a site that the forward never reached."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class LayoutError(InstrumentError, ValueError):
    """Which axis of a tensor is what cannot be told."""


class BatchError(InstrumentError, ValueError):
    """ids, labels, mask or tokens do not fit the batch."""


class ForwardError(InstrumentError, RuntimeError):
    """No forward, or one too many, in a batch context."""


class AttentionError(InstrumentError, RuntimeError):
    """Attention that was not seen, or that what was seen does not explain."""


class SessionError(InstrumentError, RuntimeError):
    """Recorders of several processes that nothing connects."""


class CompiledModelError(InstrumentError, RuntimeError):
    """Hooks would be ignored by a model that is already compiled."""


class UnsupportedModelError(InstrumentError, TypeError):
    """A wrapper that cannot be recorded."""
