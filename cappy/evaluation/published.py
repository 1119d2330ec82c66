"""Published numbers of the tasks that were published, to stand beside ours."""

import json
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cappy.evaluation.findings import Published, TaskRow

DATA = Path(__file__).with_name("data") / "published.json"


def beside(tasks: Sequence[TaskRow], metric: str, subject: str, templated: Collection[str]) -> tuple[Published, ...]:
    """The published numbers of the tasks that bear a published task's name and are measured by its metric.

    BIG-bench's own prompts come from no template: a generation task that is `templated` is another of that name.
    """
    found = []
    for collection in _collections().values():
        for row in tasks:
            same = row.kind == collection["kind"] and collection["metric"] in ("", metric)
            same = same and (row.kind == "choice" or row.task not in templated)
            if same and row.task in collection["tasks"]:
                numbers = collection["tasks"][row.task]
                ours = 100 * row.means[subject]
                found.append(Published(task=row.task, ours=ours, numbers=numbers, source=collection["source"]))
    return tuple(found)


@cache
def _collections() -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))
    return values
