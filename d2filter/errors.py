"""Every exception that d2filter raises on purpose.

D2FilterError                 exit code 1 unless said otherwise
├── UsageError                2  an option or argument that cannot be used
├── InputError                1  a file or array that is missing, broken or contradictory
├── StorageError              1  a file system that is full, read-only, or does not answer
├── DependencyError           1  a package that is not installed
├── RunStateError             1  the run directory does not fit what is asked of it
│   └── LockedError           1  another command writes to the run directory
├── StageError                1  tasks of a stage failed; the others were finished first
├── VerificationError         1  a finished run breaks one of its invariants
├── TooManyBadError           3  more bad samples than --max-bad allows, or lost shards
└── RecallError               4  the measured recall is below --target-recall

A message is one line: what is wrong, the value or file, what is allowed, what to do.
"""

from __future__ import annotations

from d2filter.text import scrubbed


class D2FilterError(Exception):
    """Root of the tree; `exit_code` is what the command line returns. URLs in a message lose their
    passwords and signatures here.
    """

    exit_code = 1

    def __init__(self, *parts: object) -> None:
        super().__init__(*(scrubbed(part) if isinstance(part, str) else part for part in parts))


class UsageError(D2FilterError):
    """An option or argument that cannot be used."""

    exit_code = 2


class InputError(D2FilterError):
    """A file or array that is missing, broken or contradictory."""


class StorageError(D2FilterError):
    """A file system that is full, read-only, or does not answer after several tries."""


class DependencyError(D2FilterError):
    """A package that is needed here and not installed."""


class RunStateError(D2FilterError):
    """The run directory does not fit what is asked of it."""


class LockedError(RunStateError):
    """Another command writes to the run directory, or has taken it over."""


class StageError(D2FilterError):
    """Tasks of a stage failed after the others were finished."""


class VerificationError(D2FilterError):
    """A finished run breaks one of its invariants."""


class TooManyBadError(D2FilterError):
    """More bad samples than allowed, or shards that could not be read."""

    exit_code = 3


class RecallError(D2FilterError):
    """The measured or predicted recall of the graph is below the target."""

    exit_code = 4
