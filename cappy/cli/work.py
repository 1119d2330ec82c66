"""`cappy explain` and `cappy clean`: list the work folder, explain why work was redone, remove old work."""

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
    from cappy.records.work import WorkFolder
    from cappy.sampling.store import StoreEntry

DAY_SECONDS = 86_400.0
WorkFlag = Annotated[Path, typer.Option(help="Folder of unfinished and finished work.")]


class WorkRow(TypedDict):
    """A row of the list of work; `last_used` is in seconds of `time.time`.

    `settings` and `differs` are set by `cappy explain`, `reason` and `removed` by `cappy clean`.
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
    """List the cached results of a step, newest first, and how the key of each differs from the previous one.

    A run continues or reuses work with the same version, settings and inputs; anything else is computed.
    """
    from cappy.records.work import list_work_folders

    if step not in STEP_SPECS:
        raise ConfigError(f"{step}: no such step{suggest(step, STEP_SPECS)}")
    with_keys = [work_folder for work_folder in list_work_folders(work, step) if work_folder.key is not None]
    rows: list[WorkRow] = []
    for index, work_folder in enumerate(with_keys):
        previous = with_keys[index + 1].key if index + 1 < len(with_keys) else None
        differs = work_folder.key.differences(previous) if work_folder.key and previous else []
        settings = dict(work_folder.key.settings) if work_folder.key else {}
        rows.append({**_row(work_folder, step), "settings": settings, "differs": differs})
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    elif not rows:
        typer.echo(f"{work / step}: no work of this step yet")
    else:
        for index, row in enumerate(rows):
            difference = ", ".join(row["differs"]) or ("first run" if index == len(rows) - 1 else "nothing")
            usage = f"{_format_age(row['last_used'])}, {_format_size(row['size_bytes'])}"
            typer.echo(f"{row['path']}  {usage}\n  differs  {difference}")
        typer.echo(f"\nsettings of the newest work\n{json.dumps(rows[0]['settings'], indent=1, ensure_ascii=False)}")


def clean(
    work: WorkFlag = DEFAULT_WORK,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, help="Also list work that was not used for this many days.", show_default="none"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the listed work.", show_default="off")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List work that no run can reuse.

    This is work of earlier versions of a step, and incomplete work folders (without key.json).

    Published outputs, registered versions and the spending record are not touched.
    """
    from cappy.records.work import list_work_folders, remove_work_folder
    from cappy.sampling import store

    limit = None if older_than is None else time.time() - older_than * DAY_SECONDS
    rows: list[WorkRow] = []
    removals: list[Callable[[], None]] = []
    fresh_names: set[str] = set()
    for work_folder in list_work_folders(work):
        if work_folder.key is not None:
            fresh_names.add(work_folder.key.fresh)
        if reason := work_folder.not_reusable_reason or _idle_reason(work_folder.last_used, limit):
            rows.append({**_row(work_folder, work_folder.step), "reason": reason, "removed": False})
            removals.append(partial(remove_work_folder, work_folder))
    for entry in store.list_entries(work):
        if reason := store.not_reusable_reason(entry, fresh_names) or _idle_reason(entry.last_used, limit):
            rows.append({**_row(entry, entry.kind), "reason": reason, "removed": False})
            removals.append(partial(store.remove_entry, entry))
    errors = _remove(rows, removals) if remove else []
    typer.echo(json.dumps(rows, indent=1) if as_json else _format_rows(work, rows, removed=remove))
    if errors:
        raise FolderError(
            f"{len(errors)} of {len(rows)} pieces of work are in use and were kept, the first: {errors[0]}"
        )


def _remove(rows: Sequence[WorkRow], removals: Sequence[Callable[[], None]]) -> list[str]:
    """Removes the work of each row and marks the row; returns the errors of work that is in use."""
    errors = []
    for row, remove in zip(rows, removals, strict=True):
        try:
            remove()
            row["removed"] = True
        except FolderError as error:
            errors.append(str(error))
    return errors


def _idle_reason(last_used: float, limit: float | None) -> str:
    return f"last used {_format_age(last_used)}" if limit is not None and last_used <= limit else ""


def _row(entry: "WorkFolder | StoreEntry", step: str) -> WorkRow:
    return {"path": str(entry.path), "step": step, "size_bytes": entry.size_bytes, "last_used": entry.last_used}


def _format_rows(work: Path, rows: Sequence[WorkRow], *, removed: bool) -> str:
    if not rows:
        return f"{work}: nothing to remove"
    lines = [f"{row['path']}  {_format_size(row['size_bytes'])}: {row['reason']}" for row in rows]
    counted = [row for row in rows if row["removed"] or not removed]
    total = f"{len(counted)} in total, {_format_size(sum(row['size_bytes'] for row in counted))}"
    return "\n".join([*lines, f"{total}{': removed' if removed else '; --remove removes them'}"])


def _format_age(last_used: float) -> str:
    from cappy.progress import duration

    days = (time.time() - last_used) / DAY_SECONDS
    return f"{days:,.0f} days ago" if days >= 2 else f"{duration(max(0.0, days * DAY_SECONDS))} ago"


def _format_size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
