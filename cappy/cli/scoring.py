"""`cappy score` and `cappy select`: JSON Lines in, the same objects with scores out, in the order of the input."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cappy.cli.jsonlines import STDIN, Line, lines, opened, write_line
from cappy.scoring import Precision

if TYPE_CHECKING:
    from cappy.scoring import Scorer

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
    _stream("score", scorer, precision, source, _scored)


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
    _stream("select", scorer, precision, source, _selected)


def _load(spec: str, precision: Precision) -> "Scorer":
    from cappy.scoring import Scorer

    scorer = Scorer.load(spec, precision=precision)
    scorer.cuts.logs = False
    return scorer


def _stream(verb: str, spec: str, precision: Precision, source: str, answer: Any) -> None:
    with opened(source) as file:
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


def _scored(scorer: "Scorer", chunk: Sequence[Line]) -> Iterator[dict[str, Any]]:
    scores = scorer.score([(line.text("instruction"), line.text("response")) for line in chunk])
    for line, value in zip(chunk, scores, strict=True):
        yield {**line.value, "score": value}


def _selected(scorer: "Scorer", chunk: Sequence[Line]) -> Iterator[dict[str, Any]]:
    groups = [(line.text("instruction"), line.texts("responses")) for line in chunk]
    for line, pick in zip(chunk, scorer.select_stream(groups), strict=True):
        yield {**line.value, "selected": pick.index, "response": pick.response, "scores": list(pick.scores)}


def _chunks(values: Iterable[Line]) -> Iterator[list[Line]]:
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, CHUNK_LINES)):
        yield chunk
