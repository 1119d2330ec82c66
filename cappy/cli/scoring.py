"""`cappy score` and `cappy select`: read JSON Lines and write the same objects with scores, in the same order.

Errors name source:line and field. One line or one chunk of lines is in memory at a time.
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
    from cappy.selection import Candidates


STDIN = "-"
MAX_LINE_BYTES = 64 * 2**20
_STDIN_PATHS = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
"""Other names of standard input, which `reserve_stdin` replaces by an empty file."""
_reserved_stdin: IO[bytes] | None = None
"""Standard input while `reserve_stdin` reserves it."""


@dataclass(frozen=True)
class Line:
    """An object of the input and its position (source:line)."""

    where: str
    value: Mapping[str, object]

    def text(self, field: str) -> str:
        """The text in a field. Raises RecordError if it is missing or not a text."""
        return self._text(field, self._field(field))

    def texts(self, field: str) -> list[str]:
        """The list of texts in a field, at least one. Raises RecordError if it is anything else."""
        values = self._field(field)
        if not isinstance(values, list) or not values:
            raise RecordError(f"{self.where}: {field} must be a list of at least one text, got {quote(values)}")
        return [self._text(f"{field}[{index}]", value) for index, value in enumerate(values)]

    def candidates(self) -> "Candidates":
        """The candidates with what the line says about them. Raises RecordError if a field is invalid."""
        from cappy.selection import Candidates

        responses = self.texts("responses")
        likelihoods, greedy = self.value.get("likelihoods"), self.value.get("greedy")
        closed_choices = self.value.get("closed_choices", False)
        if likelihoods is not None and not (isinstance(likelihoods, list) and all(map(_is_number, likelihoods))):
            raise RecordError(f"{self.where}: likelihoods must be a list of numbers, got {quote(likelihoods)}")
        if greedy is not None and (not isinstance(greedy, int) or isinstance(greedy, bool)):
            raise RecordError(f"{self.where}: greedy must be the index of a response, got {quote(greedy)}")
        truncated = self.value.get("truncated", [])
        if not (isinstance(truncated, list) and all(map(_is_index, truncated))):
            raise RecordError(f"{self.where}: truncated must be a list of indices of responses, got {quote(truncated)}")
        if not isinstance(closed_choices, bool):
            raise RecordError(f"{self.where}: closed_choices must be true or false, got {quote(closed_choices)}")
        try:
            return Candidates(
                responses=responses,
                likelihoods=likelihoods,
                greedy=greedy,
                closed_choices=closed_choices,
                truncated=truncated,
            )
        except ConfigError as error:
            raise RecordError(f"{self.where}: {error}") from None

    def _field(self, field: str) -> object:
        if field not in self.value:
            names = ", ".join(self.value) or "none"
            raise RecordError(f"{self.where}: has no field {quote(field)}; add it (fields found: {quote(names)})")
        return self.value[field]

    def _text(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            raise RecordError(f"{self.where}: {field} must be a string, got {quote(value)}")
        if not _encodable(value):
            raise RecordError(
                f"{self.where}: {field} contains an unpaired surrogate, got {quote(value)}; write the whole character"
            )
        return value


@contextlib.contextmanager
def reserve_stdin() -> Iterator[None]:
    """In this block only `open_source` can read standard input; for all other code it is empty.

    Otherwise a library that asks a question on the terminal would take a line of the user's data as the answer.
    """
    global _reserved_stdin
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        # There is no standard input, or it has no file descriptor, as in a test.
        yield
        return
    original = sys.stdin
    with os.fdopen(os.dup(descriptor), "rb") as reserved, Path(os.devnull).open() as empty:
        os.dup2(empty.fileno(), descriptor)
        _reserved_stdin, sys.stdin = reserved, empty
        try:
            yield
        finally:
            _reserved_stdin, sys.stdin = None, original
            os.dup2(reserved.fileno(), descriptor)


@contextlib.contextmanager
def open_source(source: str) -> Iterator[IO[bytes]]:
    """Opens a file; `-`, /dev/stdin and the like open standard input. Raises ConfigError if it cannot be read."""
    if source == STDIN or source in _STDIN_PATHS:
        file = _reserved_stdin or getattr(sys.stdin, "buffer", None)
        if file is None:
            raise ConfigError(f"{source}: standard input is closed; give a JSON Lines file: --source FILE")
        if file.isatty():
            sys.stderr.write("reading JSON Lines from the keyboard; end with Ctrl-D\n")
        yield file
        return
    # Inside this `try`, a `with` would also catch OSErrors raised in the caller's block.
    try:
        file = Path(source).open("rb")  # noqa: SIM115 (see below)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{source}: {reason}; --source must be a JSON Lines file, or - for standard input") from error
    with file:
        yield file


def lines(file: IO[bytes], source: str) -> Iterator[Line]:
    """Yields the objects of JSON Lines; skips blank lines. Raises RecordError with the position of an invalid line."""
    name = "stdin" if source == STDIN else source
    for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        where = f"{name}:{number}"
        if len(raw) > MAX_LINE_BYTES:
            raise RecordError(f"{where}: the line is longer than {MAX_LINE_BYTES:,} bytes; write one object per line")
        if raw.strip():
            yield Line(where, _parse_object(where, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw))


def write_line(value: Mapping[str, object]) -> None:
    """Writes one object to standard output as UTF-8, whatever the locale."""
    text = json.dumps(value, ensure_ascii=False)
    if not _encodable(text):
        text = json.dumps(value)
    sys.stdout.buffer.write(text.encode() + b"\n")


def _parse_object(where: str, raw: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: is not UTF-8 (byte {error.start + 1}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"{where}: is not JSON ({reason}), got {quote(raw.decode().strip())}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{where}: must be a JSON object, got {quote(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_constant(name: str) -> None:
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
    Precision, typer.Option(help="Precision of the encoder; auto is bf16 if the device supports it.")
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

    A score says how correct the response is, about 0 to 1. With --instruction and --response, prints only the number.
    """
    if (instruction is None) != (response is None):
        raise typer.BadParameter("--instruction and --response must be given together")
    if instruction is not None and response is not None:
        loaded = _load(scorer, precision)
        typer.echo(loaded.score([(instruction, response)])[0])
        _report_truncation("score", loaded)
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
    selector: Annotated[
        Path | None,
        typer.Option(
            help="Folder with selector.json, such as a report; default: the scorer's own folder.",
            show_default="the scorer's own folder",
        ),
    ] = None,
    precision: PrecisionFlag = "auto",
) -> None:
    """Pick the best of several responses: JSON Lines {instruction, responses} in.

    Picks by the selector that was evaluated with the scorer, or by the score alone if there is none. A line may also
    have "likelihoods" (per token, one for each response), "greedy" (index of the greedy response) and "closed_choices"
    (true if the responses are all possible answers), which the selector uses.

    Writes the same objects with "selected" (index of the response, from 0), "response", "scores" and "values" (those
    of the selector). With --instruction and several --response, prints only the picked response.
    """
    if (instruction is None) != (not response):
        raise typer.BadParameter("--instruction and --response (once per response) must be given together")
    if instruction is not None:
        loaded = _load(scorer, precision, selector)
        typer.echo(loaded.select(instruction, response).response)
        _report_truncation("select", loaded)
        return
    _stream("select", scorer, precision, source, _select_lines, selector)


def _load(spec: str, precision: Precision, selector: Path | None = None) -> "Scorer":
    from cappy.scoring import Scorer

    scorer = Scorer.load(spec, precision=precision)
    scorer.truncation_counts.log_first = False
    if selector is not None:
        from cappy.selection import require_selector

        scorer.selector = require_selector(selector, scorer.version)
    return scorer


def _stream(
    verb: str,
    spec: str,
    precision: Precision,
    source: str,
    process_chunk: "Callable[[Scorer, Sequence[Line]], Iterator[Mapping[str, object]]]",
    selector: Path | None = None,
) -> None:
    with open_source(source) as file:
        scorer = _load(spec, precision, selector)
        for chunk in _chunks(lines(file, source)):
            for value in process_chunk(scorer, chunk):
                write_line(value)
            sys.stdout.buffer.flush()
    _report_truncation(verb, scorer)


def _report_truncation(verb: str, scorer: "Scorer") -> None:
    """Prints how many pairs were truncated to standard error."""
    if text := scorer.truncation_counts.text():
        typer.echo(f"cappy {verb}: {text}", err=True)


def _score_lines(scorer: "Scorer", chunk: Sequence[Line]) -> Iterator[Mapping[str, object]]:
    scores = scorer.score([(line.text("instruction"), line.text("response")) for line in chunk])
    for line, value in zip(chunk, scores, strict=True):
        yield {**line.value, "score": value}


def _select_lines(scorer: "Scorer", chunk: Sequence[Line]) -> Iterator[Mapping[str, object]]:
    pools = [(line.text("instruction"), line.candidates()) for line in chunk]
    for line, pick in zip(chunk, scorer.select_stream(pools), strict=True):
        yield {
            **line.value,
            "selected": pick.index,
            "response": pick.response,
            "scores": list(pick.scores),
            "values": list(pick.values),
        }


def _chunks(values: Iterable[Line]) -> Iterator[list[Line]]:
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, CHUNK_LINES)):
        yield chunk
