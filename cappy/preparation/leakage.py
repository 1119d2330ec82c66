"""The leakage check: no prompt, group or row of an evaluation set among those that training sees."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cappy.errors import RecordError, shown
from cappy.preparation.prompted import Tally, holds
from cappy.records import Instance, prompt_hash, read_batches
from cappy.records.overlap import Prompt, RowIndex, group_hash, is_content, sketch_rows

_COLUMNS = ["instruction", "task", "group_id"]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What must not be trained on: sorted hashes of prompts and of groups, and the text of rows."""

    prompts: "array[int]"
    groups: "array[int]"
    rows: RowIndex

    def found(self, instance: Instance) -> str:
        """What of an instance stands in an evaluation set, in words; empty if nothing does."""
        if holds(self.prompts, prompt_hash(instance.instruction)):
            return "has a prompt"
        if is_content(instance.group_id) and holds(self.groups, group_hash(instance)):
            return "is of a group"
        return "has the text of a row" if self.rows.holds(instance) else ""


def evaluated(folders: Sequence[Path]) -> Evaluated | None:
    """What stands in these folders; see `prompt_hash` and `cappy.records.overlap` for what counts as equal."""
    if not folders:
        return None
    prompts, groups = array("Q"), array("Q")

    def read() -> Iterator[Prompt]:
        for folder in folders:
            for batch in read_batches(folder, columns=_COLUMNS):
                for row in zip(*(batch[name].to_pylist() for name in _COLUMNS), strict=True):
                    prompt = Prompt(*row)
                    prompts.append(prompt_hash(prompt.instruction))
                    if is_content(prompt.group_id):
                        groups.append(group_hash(prompt))
                    yield prompt

    index = RowIndex(sketch_rows(read()))
    return Evaluated(prompts=_sorted(prompts), groups=_sorted(groups), rows=index)


def _sorted(hashes: "array[int]") -> "array[int]":
    return array("Q", np.unique(np.array(hashes, dtype=np.uint64)).tobytes())


def kept_apart(
    instances: Iterable[Instance], held: Evaluated | None, folders: Sequence[Path], tally: Tally, *, drop: bool
) -> Iterator[Instance]:
    """The instances without those of train and validation that stand in an evaluation set.

    They are dropped and counted, or refused: RecordError names the first.
    """
    for instance in instances:
        what = held.found(instance) if held is not None and instance.split != "test" else ""
        if what:
            if not drop:
                where = ", ".join(map(str, folders))
                found = f"instance {shown(instance.instance_id)} of {instance.split} {what} that stands in {where}"
                raise RecordError(f"{found}; leave such instances out with --leaked drop, or mend the data")
            tally.counts["dropped_leaked"] += 1
            continue
        yield instance
