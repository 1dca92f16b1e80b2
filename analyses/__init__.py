"""Runs into results; no model and no data set needed."""

from .errors import AnalysisError
from .probing import fit_probes
from .results import ProbeReport, ProbeScore

__all__ = ["AnalysisError", "ProbeReport", "ProbeScore", "fit_probes"]
