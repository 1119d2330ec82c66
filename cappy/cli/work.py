"""`cappy explain` and `cappy clean`: what lies in the work folder, why work was done again, what may go."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NotRequired, TypedDict

import typer

from cappy.cli.flags import JsonFlag
from cappy.config import DEFAULT_WORK
from cappy.errors import ConfigError, FolderError, suggest
from cappy.steps import STEP_SPECS

if TYPE_CHECKING:
    from cappy.records.work import Piece
    from cappy.sampling.store import Entry

DAY_SECONDS = 86_400.0
WorkFlag = Annotated[Path, typer.Option(help="Folder that keeps unfinished and finished work.")]


class Row(TypedDict):
    """What is listed of a piece of work; `last_used` is in seconds of `time.time`.

    `settings` and `differs` are of `cappy explain`, `reason` and `removed` are of `cappy clean`.
    """

    path: str
    step: str
    size_bytes: int
    last_used: float
    settings: NotRequired[Mapping[str, object]]
    differs: NotRequired[Sequence[str]]
    reason: NotRequired[str]
    removed: NotRequired[bool]


def explain(
    step: Annotated[str, typer.Argument(help="Step whose work is listed.", show_default=False)],
    work: WorkFlag = DEFAULT_WORK,
    as_json: JsonFlag = False,
) -> None:
    """List a step's pieces of work, newest first, and how each differs from the one before it.

    A run continues or reuses work of the same version, settings and inputs; anything else is new work.
    """
    from cappy.records.work import list_pieces

    if step not in STEP_SPECS:
        raise ConfigError(f"{step}: no such step{suggest(step, STEP_SPECS)}")
    keyed = [piece for piece in list_pieces(work, step) if piece.key is not None]
    rows: list[Row] = []
    for number, piece in enumerate(keyed):
        before = keyed[number + 1].key if number + 1 < len(keyed) else None
        differs = piece.key.differences(before) if piece.key and before else []
        settings = dict(piece.key.settings) if piece.key else {}
        rows.append({**_row(piece, step), "settings": settings, "differs": differs})
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    elif not rows:
        typer.echo(f"{work / step}: no work of this step yet")
    else:
        for number, row in enumerate(rows):
            difference = ", ".join(row["differs"]) or ("the first one" if number == len(rows) - 1 else "nothing")
            typer.echo(f"{row['path']}  {_age(row['last_used'])}, {_size(row['size_bytes'])}\n  differs  {difference}")
        typer.echo(f"\nsettings of the newest\n{json.dumps(rows[0]['settings'], indent=1, ensure_ascii=False)}")


def clean(
    work: WorkFlag = DEFAULT_WORK,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, help="List all that was not used for so many days, too.", show_default="none of it"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is listed.", show_default="off")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List what no run finds again in the work folder: work of earlier versions and without a key.

    Published outputs, registered versions and the record of what was spent are not touched.
    """
    from cappy.records.work import list_pieces, remove_piece
    from cappy.sampling import store

    limit = None if older_than is None else time.time() - older_than * DAY_SECONDS
    rows: list[Row] = []
    removals: list[Callable[[], None]] = []
    fresh: set[str] = set()
    for piece in list_pieces(work):
        if piece.key is not None:
            fresh.add(piece.key.fresh)
        if reason := piece.unreachable or _idle_time(piece.last_used, limit):
            rows.append({**_row(piece, piece.step), "reason": reason, "removed": False})
            removals.append(partial(remove_piece, piece))
    for entry in store.entries(work):
        if reason := store.unreachable(entry, fresh) or _idle_time(entry.last_used, limit):
            rows.append({**_row(entry, entry.kind), "reason": reason, "removed": False})
            removals.append(partial(store.remove, entry))
    kept = _remove(rows, removals) if remove else []
    typer.echo(json.dumps(rows, indent=1) if as_json else _text(work, rows, removed=remove))
    if kept:
        raise FolderError(f"{len(kept)} of {len(rows)} are in use and were kept, the first: {kept[0]}")


def _remove(rows: Sequence[Row], removals: Sequence[Callable[[], None]]) -> list[str]:
    """Removes each row's work; notes in the rows what was removed, and returns why the others were kept."""
    kept = []
    for row, remove in zip(rows, removals, strict=True):
        try:
            remove()
            row["removed"] = True
        except FolderError as error:
            kept.append(str(error))
    return kept


def _idle_time(last_used: float, limit: float | None) -> str:
    return f"last used {_age(last_used)}" if limit is not None and last_used <= limit else ""


def _row(piece: "Piece | Entry", step: str) -> Row:
    return {"path": str(piece.path), "step": step, "size_bytes": piece.size_bytes, "last_used": piece.last_used}


def _text(work: Path, rows: Sequence[Row], *, removed: bool) -> str:
    if not rows:
        return f"{work}: nothing to remove"
    lines = [f"{row['path']}  {_size(row['size_bytes'])}: {row['reason']}" for row in rows]
    gone = [row for row in rows if row["removed"] or not removed]
    total = f"{len(gone)} in all, {_size(sum(row['size_bytes'] for row in gone))}"
    return "\n".join([*lines, f"{total}{': removed' if removed else '; --remove removes them'}"])


def _age(last_used: float) -> str:
    from cappy.progress import duration

    days = (time.time() - last_used) / DAY_SECONDS
    return f"{days:,.0f} days ago" if days >= 2 else f"{duration(max(0.0, days * DAY_SECONDS))} ago"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
