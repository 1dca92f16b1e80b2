"""Runs into results; no model and no data set needed."""

from .anchor_auc import AnchorAUC, anchor_auc
from .anchor_distances import AnchorDistance, anchor_distances
from .anchor_flow import AnchorFlow, anchor_flow
from .anchor_positions import AnchorPositions, anchor_positions
from .errors import AnalysisError
from .probe_report import ProbeReport, ProbeScore
from .probing import fit_probes
from .results import Result
from .sweep import Accumulator, Job, sweep

__all__ = [
    "Accumulator",
    "AnalysisError",
    "AnchorAUC",
    "AnchorDistance",
    "AnchorFlow",
    "AnchorPositions",
    "Job",
    "ProbeReport",
    "ProbeScore",
    "Result",
    "anchor_auc",
    "anchor_distances",
    "anchor_flow",
    "anchor_positions",
    "fit_probes",
    "sweep",
]
