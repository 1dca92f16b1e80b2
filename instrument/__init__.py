"""A live model into a run: `record` a data set in one call, or use a `Recorder` in any loop."""

from .errors import InstrumentError
from .recorder import Recorder
from .recording import record
from .sites import Site

__all__ = ["InstrumentError", "Recorder", "Site", "record"]
