"""`cappy score` and `cappy select`: JSON Lines in, the same objects with scores out, in the order of the input.

Every error names source:line and field; memory holds one line, or one chunk of lines, at a time.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from cappy.errors import ConfigError, RecordError, quote
from cappy.scoring import Precision

if TYPE_CHECKING:
    from cappy.scoring import Scorer


STDIN = "-"
MAX_LINE_BYTES = 64 * 2**20
_STDIN_PATHS = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
"""Other names of standard input, which would lead to the empty file in its place."""
_data: IO[bytes] | None = None
"""Standard input, while `reserve_stdin` keeps it from everybody else."""


@dataclass(frozen=True)
class Line:
    """An object of the input and where it stands (source:line)."""

    where: str
    value: Mapping[str, object]

    def text(self, field: str) -> str:
        """The text in a field; RecordError if there is none."""
        return self._text(field, self._field(field))

    def texts(self, field: str) -> list[str]:
        """The list of texts in a field, at least one; RecordError if it is anything else."""
        values = self._field(field)
        if not isinstance(values, list) or not values:
            raise RecordError(f"{self.where}: {field} must be a list of at least one text, got {quote(values)}")
        return [self._text(f"{field}[{index}]", value) for index, value in enumerate(values)]

    def _field(self, field: str) -> object:
        if field not in self.value:
            names = ", ".join(self.value) or "none"
            raise RecordError(f"{self.where}: has no field {quote(field)}; add it (fields here: {quote(names)})")
        return self.value[field]

    def _text(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            raise RecordError(f"{self.where}: {field} must be a text in quotes, got {quote(value)}")
        if not _encodable(value):
            raise RecordError(f"{self.where}: {field} holds half a character (lone surrogate), mend {quote(value)}")
        return value


@contextlib.contextmanager
def reserve_stdin() -> Iterator[None]:
    """Inside, `open_source` alone reads standard input; whoever else reads it finds its end.

    It is data of the user's. A library that asks a question there would take a line of it for the answer.
    """
    global _data
    try:
        number = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        # None at all, or an object without a file behind it, as in a test.
        yield
        return
    usual = sys.stdin
    with os.fdopen(os.dup(number), "rb") as kept, Path(os.devnull).open() as empty:
        os.dup2(empty.fileno(), number)
        _data, sys.stdin = kept, empty
        try:
            yield
        finally:
            _data, sys.stdin = None, usual
            os.dup2(kept.fileno(), number)


@contextlib.contextmanager
def open_source(source: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, or of standard input for `-` and its names below /dev; ConfigError if it cannot be read."""
    if source == STDIN or source in _STDIN_PATHS:
        file = _data or getattr(sys.stdin, "buffer", None)
        if file is None:
            raise ConfigError(f"{source}: standard input is closed; give a JSON Lines file: --source FILE")
        if file.isatty():
            sys.stderr.write("reading JSON Lines from the keyboard; end with Ctrl-D\n")
        yield file
        return
    try:
        file = Path(source).open("rb")  # noqa: SIM115 (a `with` here would take the reader's errors for its own)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{source}: {reason}; --source is a JSON Lines file, or - for standard input") from error
    with file:
        yield file


def lines(file: IO[bytes], source: str) -> Iterator[Line]:
    """The objects of JSON Lines, blank lines left out; RecordError names the line that is none."""
    name = "stdin" if source == STDIN else source
    for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        where = f"{name}:{number}"
        if len(raw) > MAX_LINE_BYTES:
            raise RecordError(f"{where}: the line is longer than {MAX_LINE_BYTES:,} bytes; write one object per line")
        if raw.strip():
            yield Line(where, _object(where, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw))


def write_line(value: Mapping[str, object]) -> None:
    """Writes one object to standard output, UTF-8 whatever the locale says."""
    text = json.dumps(value, ensure_ascii=False)
    if not _encodable(text):
        text = json.dumps(value)
    sys.stdout.buffer.write(text.encode() + b"\n")


def _object(where: str, raw: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: is not UTF-8 (byte {error.start + 1}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"{where}: is not JSON ({reason}), got {quote(raw.decode().strip())}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{where}: must be an object in braces, got {quote(value)}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


CHUNK_LINES = 256

ScorerFlag = Annotated[
    str,
    typer.Option(help="Scorer: builtin, a folder, hub:org/name@revision, models:/name@alias or models:/name/version."),
]
SourceFlag = Annotated[str, typer.Option(help="JSON Lines file, or - for standard input.")]
PrecisionFlag = Annotated[
    Precision, typer.Option(help="What the encoder runs in; auto is bf16 where the device has instructions for it.")
]
InstructionFlag = Annotated[
    str | None, typer.Option(help="One instruction, instead of --source.", show_default="none: read --source")
]


def score(
    scorer: ScorerFlag = "builtin",
    source: SourceFlag = STDIN,
    instruction: InstructionFlag = None,
    response: Annotated[
        str | None, typer.Option(help="The response to --instruction.", show_default="none: read --source")
    ] = None,
    precision: PrecisionFlag = "auto",
) -> None:
    """Score responses: JSON Lines {instruction, response} in, the same with "score" out.

    A score says how correct the response is, about 0 to 1. With --instruction and --response, prints the number alone.
    """
    if (instruction is None) != (response is None):
        raise typer.BadParameter("--instruction and --response go together")
    if instruction is not None and response is not None:
        loaded = _load(scorer, precision)
        typer.echo(loaded.score([(instruction, response)])[0])
        _say_cuts("score", loaded)
        return
    _stream("score", scorer, precision, source, _score_lines)


def select(
    scorer: ScorerFlag = "builtin",
    source: SourceFlag = STDIN,
    instruction: InstructionFlag = None,
    response: Annotated[
        list[str],
        typer.Option(
            metavar="<str>", help="A response to --instruction (repeatable).", show_default="none: read --source"
        ),
    ] = [],  # noqa: B006 (typer needs the default and copies it)
    precision: PrecisionFlag = "auto",
) -> None:
    """Pick the best of several responses: JSON Lines {instruction, responses} in.

    Out come the same objects with "selected" (which response, counted from 0), "response" and "scores".
    With --instruction and several --response, prints the picked response alone.
    """
    if (instruction is None) != (not response):
        raise typer.BadParameter("--instruction and --response (once per response) go together")
    if instruction is not None:
        loaded = _load(scorer, precision)
        typer.echo(loaded.select(instruction, response).response)
        _say_cuts("select", loaded)
        return
    _stream("select", scorer, precision, source, _select_lines)


def _load(spec: str, precision: Precision) -> "Scorer":
    from cappy.scoring import Scorer

    scorer = Scorer.load(spec, precision=precision)
    scorer.cuts.logs = False
    return scorer


def _stream(
    verb: str,
    spec: str,
    precision: Precision,
    source: str,
    answer: "Callable[[Scorer, Sequence[Line]], Iterator[Mapping[str, object]]]",
) -> None:
    with open_source(source) as file:
        scorer = _load(spec, precision)
        for chunk in _chunks(lines(file, source)):
            for value in answer(scorer, chunk):
                write_line(value)
            sys.stdout.buffer.flush()
    _say_cuts(verb, scorer)


def _say_cuts(verb: str, scorer: "Scorer") -> None:
    """How many pairs were too long, on standard error."""
    if text := scorer.cuts.text():
        typer.echo(f"cappy {verb}: {text}", err=True)


def _score_lines(scorer: "Scorer", chunk: Sequence[Line]) -> Iterator[Mapping[str, object]]:
    scores = scorer.score([(line.text("instruction"), line.text("response")) for line in chunk])
    for line, value in zip(chunk, scores, strict=True):
        yield {**line.value, "score": value}


def _select_lines(scorer: "Scorer", chunk: Sequence[Line]) -> Iterator[Mapping[str, object]]:
    groups = [(line.text("instruction"), line.texts("responses")) for line in chunk]
    for line, pick in zip(chunk, scorer.select_stream(groups), strict=True):
        yield {**line.value, "selected": pick.index, "response": pick.response, "scores": list(pick.scores)}


def _chunks(values: Iterable[Line]) -> Iterator[list[Line]]:
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, CHUNK_LINES)):
        yield chunk
