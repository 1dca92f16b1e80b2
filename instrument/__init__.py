"""A live model into a run: `record` a data set in one call, or use a `Recorder` in any loop."""

from .errors import InstrumentError
from .pca import PCA
from .probe_set import ProbeSet
from .recorder import Recorder
from .recording import record
from .schedule import Schedule
from .sites import Site

__all__ = ["PCA", "InstrumentError", "ProbeSet", "Recorder", "Schedule", "Site", "record"]
