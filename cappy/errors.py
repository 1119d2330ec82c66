"""Errors that a user can fix.

    CappyError
    ├── ConfigError       a setting, a flag or a spec has a wrong value
    ├── RecordError       a line, a row or a field of the input is invalid
    ├── FolderError       a folder of records, a scorer or a report is unfinished, damaged or locked
    ├── GeneratorError    an LLM could not be reached, or refused the request
    ├── TrainingError     training had to stop: the loss is not a number, memory ran out, a rank or the machine was lost
    │   └── UnansweredError   the platform that runs a training job did not answer; it may answer later
    └── RegistryError     a version that MLflow does not have, files that differ, a busy lock, MLflow unreachable
        └── UnreachableError  MLflow or its store did not answer; it may answer later

Each message is one line: the input (file, line, field), the problem (with the value), the remedy. The command line
prints it on stderr and exits with 1. Every other exception is a bug and keeps its traceback. A `ProblemsError` stands
for several problems that were found together, each with its own line.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence

from cappy.redaction import redact, truncate


class CappyError(Exception):
    """A problem that a user can fix; the message says how and contains no secret that this process knows."""

    def __str__(self) -> str:
        return redact(super().__str__())


class ConfigError(CappyError):
    """A setting, a flag or a spec has a wrong value."""


class ProblemsError(ConfigError):
    """Several problems that independent checks found; `lines` has the message of each."""

    def __init__(self, errors: Sequence[CappyError]) -> None:
        self.lines = [line for error in errors for line in error_lines(error)]
        super().__init__("; also: ".join(self.lines))


class RecordError(CappyError):
    """A line, a row or a field of the input is invalid."""


class FolderError(CappyError):
    """A folder of records, a scorer or a report is unfinished, damaged or locked."""


class GeneratorError(CappyError):
    """An LLM could not be reached, or refused the request."""


class TrainingError(CappyError):
    """Training had to stop: the loss is not a number, memory ran out, a rank or the machine was lost."""


class UnansweredError(TrainingError):
    """The platform that runs a training job did not answer; it may answer later."""


class RegistryError(CappyError):
    """A problem of the registry: no such version, files that differ, a busy lock, or MLflow unreachable."""


class UnreachableError(RegistryError):
    """MLflow or its store did not answer; it may answer later."""


class Problems:
    """Collects the errors of independent checks, so that they are shown together."""

    def __init__(self) -> None:
        self.errors: list[CappyError] = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps the CappyError that the block raises, if it raises one."""
        try:
            yield
        except CappyError as error:
            self.errors.append(error)

    def raise_all(self) -> None:
        """Raises the only error unchanged, or a ProblemsError with each message once; nothing if there is none."""
        distinct = list({str(error): error for error in self.errors}.values())
        if len(distinct) == 1:
            raise distinct[0]
        if distinct:
            raise ProblemsError(distinct)


def error_lines(error: CappyError) -> list[str]:
    """The message of an error as one line, or the lines of several problems."""
    return list(error.lines) if isinstance(error, ProblemsError) else [" ".join(str(error).split())]


def quote(value: object, limit: int = 60, *, keys: Sequence[str] = ()) -> str:
    """`value` for an error message: redacted, quoted by repr, truncated to `limit` characters.

    `keys` are secrets in addition to those that this process knows.
    """
    return truncate(repr(redact(value, *keys) if isinstance(value, str) else value), limit, *keys)


def suggest(word: str, choices: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message about an unknown word: the closest choice, else `otherwise`, else all choices."""
    names = sorted(choices)
    nearest = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else otherwise or f"; choose one of {', '.join(names)}"
