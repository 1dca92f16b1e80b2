"""Runs into results; no model and no data set needed."""

from .cavs import CAV, CAVs, ConceptScores
from .concepts import fit_cavs
from .errors import AnalysisError
from .probe_report import ProbeReport, ProbeScore
from .probing import fit_probes
from .results import Result
from .sweep import Accumulator, Job, sweep
from .tcav import tcav
from .tcav_report import TCAV, TCAVScore

__all__ = [
    "CAV",
    "TCAV",
    "Accumulator",
    "AnalysisError",
    "CAVs",
    "ConceptScores",
    "Job",
    "ProbeReport",
    "ProbeScore",
    "Result",
    "TCAVScore",
    "fit_cavs",
    "fit_probes",
    "sweep",
    "tcav",
]
