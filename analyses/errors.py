"""Errors of analyses.

AnalysisError
├── LabelError (ValueError)     labels that no analysis can be made of
├── SizeError (ValueError)      more components, rows or neighbours than there are
├── JoinError (ValueError)      two runs that do not hold the same rows of the same examples
└── ResultFileError (ValueError)  a file that holds no such result
"""


class AnalysisError(Exception):
    """An analysis that the run does not allow."""


class LabelError(AnalysisError, ValueError):
    """Labels that no analysis can be made of: fewer than two classes, or too few groups to split."""


class SizeError(AnalysisError, ValueError):
    """More components, rows or neighbours than there are."""


class JoinError(AnalysisError, ValueError):
    """Two runs that do not hold the same rows of the same examples."""


class ResultFileError(AnalysisError, ValueError):
    """A file that does not hold a result of the kind that was asked for."""
