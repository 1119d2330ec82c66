"""What can go wrong in a way that a person can mend.

    CappyError
    ├── ConfigError       a setting, a flag or a spec has a wrong value
    ├── RecordError       a line, a row or a field of the input is not what it must be
    ├── FolderError       a folder of records, a scorer or a report is unfinished, damaged or busy
    ├── GeneratorError    an LLM could not be reached, or refused
    ├── TrainingError     training had to stop: the loss is not a number, memory ran out, a rank or the machine went
    │   └── UnansweredError   the platform that runs a training job did not answer; it may do so later
    └── RegistryError     MLflow does not know the version, or holds another one than was registered
        └── UnreachableError  MLflow or its store did not answer; it may do so later

The text of each is one line: what (file, line, field), what was wrong (the value), what to do. The command line
prints it on stderr and exits with 1. Every other exception is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence

from cappy.redaction import redact, truncate


class CappyError(Exception):
    """Something that a person can mend; its text says how, and holds no secret that this process knows."""

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(CappyError):
    """A setting, a flag or a spec has a wrong value."""


class RecordError(CappyError):
    """A line, a row or a field of the input is not what it must be."""


class FolderError(CappyError):
    """A folder of records, a scorer or a report is unfinished, damaged or busy."""


class GeneratorError(CappyError):
    """An LLM could not be reached, or refused."""


class TrainingError(CappyError):
    """Training had to stop: the loss is not a number, memory ran out, a rank or the machine went."""


class UnansweredError(TrainingError):
    """The platform that runs a training job did not answer; it may do so later."""


class RegistryError(CappyError):
    """MLflow could not be reached, does not know the version, or holds another one than was registered."""


class UnreachableError(RegistryError):
    """MLflow or its store did not answer; it may do so later."""


def quote(value: object, limit: int = 60, *, keys: Sequence[str] = ()) -> str:
    """`value` as it may stand in one line of an error: without secrets, quoted by repr, cut to `limit` characters.

    `keys` are secrets beside those that this process knows.
    """
    return truncate(repr(redact(value, *keys) if isinstance(value, str) else value), limit, *keys)


def near(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a line about an unknown word: the nearest known one, else `otherwise`, else all that there are."""
    names = sorted(known)
    nearest = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else otherwise or f"; there are {', '.join(names)}"
