"""What this package refuses to do, as exceptions that are told from defects.

Each is a subclass of the built-in exception that fits, so ``except ValueError`` goes on working. All share `Refused`,
which the command line turns into one line. Every message says what was wrong, the value, and what to do.
"""

from __future__ import annotations


class Refused(Exception):
    """Base of everything that this package refuses with a message of its own."""


class InvalidValue(Refused, ValueError):
    """A value is out of range or does not fit the others."""


class InvalidType(Refused, TypeError):
    """An argument has the wrong type."""


class Unsupported(Refused, NotImplementedError):
    """What was asked for cannot be done here; the message says what can."""


class DoesNotFit(Refused, MemoryError):
    """A run would need more memory than is free."""


class MissingPackage(Refused, ImportError):
    """A package is absent, or has a version that is not supported."""


class MissingFile(Refused, FileNotFoundError):
    """A file or folder is absent or cannot be read."""


class PatchConflict(Refused, RuntimeError):
    """The patch, the model and the cache do not belong together, or a run is in the way."""


class NotFinite(Refused, RuntimeError):
    """A model computes what is no number, and a run on it would mean nothing."""


class RankFailed(Refused, RuntimeError):
    """Another process of a pipeline failed or ended, and what all of them did together ends with it."""
