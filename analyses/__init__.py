"""Runs into results; no model and no data set needed."""

from .errors import AnalysisError
from .neuron_table import NeuronTable
from .neurons import neuron_table
from .probe_report import ProbeReport, ProbeScore
from .probing import fit_probes
from .projection import pca, tsne
from .projections import Embedding2D, Projections
from .results import Result
from .similarities import Similarity
from .similarity import cka
from .sweep import Accumulator, Job, sweep

__all__ = [
    "Accumulator",
    "AnalysisError",
    "Embedding2D",
    "Job",
    "NeuronTable",
    "ProbeReport",
    "ProbeScore",
    "Projections",
    "Result",
    "Similarity",
    "cka",
    "fit_probes",
    "neuron_table",
    "pca",
    "sweep",
    "tsne",
]
