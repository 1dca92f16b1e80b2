"""Errors of analyses.

AnalysisError
├── AnchorError (ValueError)    label words that were not found, or that do not fit what else was given
├── LabelError (ValueError)     labels that no analysis can be made of
├── SizeError (ValueError)      more components, rows or neighbours than there are
├── JoinError (ValueError)      two runs that do not hold the same rows of the same examples
├── StepError (ValueError)      training steps that were not recorded, or have no example in common
├── CAVError (ValueError)       concept activation vectors that cannot be had, or do not go with what they were given with
├── DegenerateGradientsError (ValueError)  gradients that are the same for every example
└── ResultFileError (ValueError)  a file that holds no such result
"""


class AnalysisError(Exception):
    """An analysis that the run does not allow."""


class AnchorError(AnalysisError, ValueError):
    """Label words that were not found where they should be, or that do not fit the sites, predictions or scores."""


class LabelError(AnalysisError, ValueError):
    """Labels that no analysis can be made of: fewer than two classes, or too few groups to split."""


class SizeError(AnalysisError, ValueError):
    """More components, rows or neighbours than there are."""


class JoinError(AnalysisError, ValueError):
    """Two runs that do not hold the same rows of the same examples."""


class StepError(AnalysisError, ValueError):
    """Training steps that were not recorded, or that have no example in common."""


class CAVError(AnalysisError, ValueError):
    """Concept activation vectors that cannot be had, or that do not go with one another or with the run."""


class DegenerateGradientsError(AnalysisError, ValueError):
    """Gradients that are the same for every example: how many of them point along a concept then says nothing."""


class ResultFileError(AnalysisError, ValueError):
    """A file that does not hold a result of the kind that was asked for."""
