"""A live model into a run: `record` a data set in one call, or use a `Recorder` in any loop."""

from .errors import InstrumentError
from .pca import PCA
from .recorder import Recorder
from .recording import record
from .sites import Site

__all__ = ["PCA", "InstrumentError", "Recorder", "Site", "record"]
