"""Runs into results; no model and no data set needed."""

from .anchor_auc import AnchorAUC, anchor_auc
from .anchor_distances import AnchorDistance, anchor_distances
from .anchor_flow import AnchorFlow, anchor_flow
from .anchor_positions import AnchorPositions, anchor_positions
from .attention_map import AttentionMap, attention_map
from .cavs import CAV, CAVs, ConceptScores
from .concepts import fit_cavs
from .drift import drift
from .drift_report import Drift
from .errors import AnalysisError
from .example_gradients import ExampleGradients, example_gradients
from .head_report import HeadStats
from .heads import head_stats
from .neuron_table import NeuronTable
from .neurons import neuron_table
from .probe_report import ProbeReport, ProbeScore
from .probing import fit_probes
from .projection import pca, tsne
from .projections import Embedding2D, Projections
from .results import Result
from .rollout import Rollout, rollout
from .saliency import gradient_x_input, token_saliency
from .similarities import Similarity
from .similarity import cka
from .step_probes import ProbeSteps, probe_steps
from .sweep import Accumulator, Job, sweep
from .tcav import tcav
from .tcav_report import TCAV, TCAVScore
from .token_scores import TokenScores

__all__ = [
    "CAV",
    "TCAV",
    "Accumulator",
    "AnalysisError",
    "AnchorAUC",
    "AnchorDistance",
    "AnchorFlow",
    "AnchorPositions",
    "AttentionMap",
    "CAVs",
    "ConceptScores",
    "Drift",
    "Embedding2D",
    "ExampleGradients",
    "HeadStats",
    "Job",
    "NeuronTable",
    "ProbeReport",
    "ProbeScore",
    "ProbeSteps",
    "Projections",
    "Result",
    "Rollout",
    "Similarity",
    "TCAVScore",
    "TokenScores",
    "anchor_auc",
    "anchor_distances",
    "anchor_flow",
    "anchor_positions",
    "attention_map",
    "cka",
    "drift",
    "example_gradients",
    "fit_cavs",
    "fit_probes",
    "gradient_x_input",
    "head_stats",
    "neuron_table",
    "pca",
    "probe_steps",
    "rollout",
    "sweep",
    "tcav",
    "token_saliency",
    "tsne",
]
