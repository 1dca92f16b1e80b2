"""Errors of analyses.

AnalysisError
├── AnchorError (ValueError)    label words that were not found, or that do not fit what else was given
├── LabelError (ValueError)     labels that no analysis can be made of
└── ResultFileError (ValueError)  a file that holds no such result
"""


class AnalysisError(Exception):
    """An analysis that the run does not allow."""


class AnchorError(AnalysisError, ValueError):
    """Label words that were not found where they should be, or that do not fit the sites, predictions or scores."""


class LabelError(AnalysisError, ValueError):
    """Labels that no analysis can be made of: fewer than two classes, or too few groups to split."""


class ResultFileError(AnalysisError, ValueError):
    """A file that does not hold a result of the kind that was asked for."""
