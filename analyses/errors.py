"""Errors of analyses.

AnalysisError
└── LabelError (ValueError)     labels that no analysis can be made of
"""


class AnalysisError(Exception):
    """An analysis that the run does not allow."""


class LabelError(AnalysisError, ValueError):
    """Labels that no analysis can be made of: fewer than two classes, or too few groups to split."""
