"""Runs into results; no model and no data set needed."""

from .errors import AnalysisError
from .probe_report import ProbeReport, ProbeScore
from .probing import fit_probes
from .results import Result
from .sweep import Accumulator, Job, sweep

__all__ = ["Accumulator", "AnalysisError", "Job", "ProbeReport", "ProbeScore", "Result", "fit_probes", "sweep"]
