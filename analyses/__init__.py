"""Runs into results; no model and no data set needed."""

from .attention_map import AttentionMap, attention_map
from .errors import AnalysisError
from .head_report import HeadStats
from .heads import head_stats
from .probe_report import ProbeReport, ProbeScore
from .probing import fit_probes
from .results import Result
from .rollout import Rollout, rollout
from .saliency import gradient_x_input, token_saliency
from .sweep import Accumulator, Job, sweep
from .token_scores import TokenScores

__all__ = [
    "Accumulator",
    "AnalysisError",
    "AttentionMap",
    "HeadStats",
    "Job",
    "ProbeReport",
    "ProbeScore",
    "Result",
    "Rollout",
    "TokenScores",
    "attention_map",
    "fit_probes",
    "gradient_x_input",
    "head_stats",
    "rollout",
    "sweep",
    "token_saliency",
]
