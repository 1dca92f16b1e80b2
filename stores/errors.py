"""Errors of stores.

StoreError
├── RunExistsError (FileExistsError)      a run is already there
├── OutputExistsError (FileExistsError)   something is where an export should go
├── NotARunError (FileNotFoundError)      the path holds no run
├── FormatVersionError (ValueError)       written by a newer version
├── DamagedError (OSError)                bytes on disk are not the bytes that were committed
├── LostPartError (RuntimeError)          this writer's part was closed by somebody else
├── BrokenWriterError (RuntimeError)      an earlier failure left this writer unusable
├── UnsafePlaceError (RuntimeError)       the place cannot keep two writers apart
├── ForkedError (RuntimeError)            object storage in a process that was forked
├── RunEndedError (RuntimeError)          a run that was followed ended before what was waited for
├── BudgetError (MemoryError)             the memory budget cannot hold one chunk per column
├── DiskShortError (OSError)              the disk has no room for what is to be written
├── SchemaError (ValueError)              what was given does not fit the run
│   └── KeyRepeatedError                  the same example twice
├── GradientError (RuntimeError)          gradients that are not what an analysis needs
├── UnknownColumnError (KeyError)      no such column, table or site
│   └── AttentionNotRecordedError      the run holds no (or not enough) attention of that site
└── MissingExampleError (KeyError)     the column has no value for that example
"""


class StoreError(Exception):
    """Anything a run or its writer refuses or finds wrong."""


class RunExistsError(StoreError, FileExistsError):
    """A run is already there and the mode does not allow to touch it."""


class OutputExistsError(StoreError, FileExistsError):
    """Something is already where an export should go."""


class NotARunError(StoreError, FileNotFoundError):
    """The path holds no run."""


class FormatVersionError(StoreError, ValueError):
    """The run uses a format, or a feature, that this version does not know."""


class DamagedError(StoreError, OSError):
    """Bytes on disk are not the bytes that were committed."""


class LostPartError(StoreError, RuntimeError):
    """Somebody else continued or sealed the part of this writer."""


class BrokenWriterError(StoreError, RuntimeError):
    """An earlier failure left this writer unusable; what was committed before it stands."""


class UnsafePlaceError(StoreError, RuntimeError):
    """The place cannot keep two writers apart, and nobody has said that there is only one."""


class ForkedError(StoreError, RuntimeError):
    """This process was forked from one that has used object storage, and cannot use it."""


class BudgetError(StoreError, MemoryError):
    """The memory budget cannot hold one chunk per column."""


class DiskShortError(StoreError, OSError):
    """The disk has no room for what is to be written; nothing was."""


class SchemaError(StoreError, ValueError):
    """What was given does not fit the run."""


class KeyRepeatedError(SchemaError):
    """The same example twice."""


class UnknownColumnError(StoreError, KeyError):
    """No column, table or site of that name."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class GradientError(StoreError, RuntimeError):
    """Gradients that are not what an analysis needs."""


class AttentionNotRecordedError(UnknownColumnError):
    """The run holds no attention, or not enough of it, of that site."""


class MissingExampleError(StoreError, KeyError):
    """The column has no value for that example."""

    __str__ = Exception.__str__


class RunEndedError(StoreError, RuntimeError):
    """A run that was followed has ended before what was waited for."""
