"""The leakage check: no prompt of an evaluation set among those that training sees."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cappy.errors import RecordError, shown
from cappy.preparation.prompted import Tally, holds
from cappy.records import Instance, prompt_hash, read_batches


def evaluation_prompts(folders: Sequence[Path]) -> "array[int]":
    """Sorted hashes of all prompts of these folders, 8 bytes each; see `prompt_hash` for what counts as equal."""
    found = [
        np.fromiter(map(prompt_hash, batch["instruction"].to_pylist()), dtype=np.uint64, count=len(batch))
        for folder in folders
        for batch in read_batches(folder, columns=["instruction"])
    ]
    prompts = array("Q")
    prompts.frombytes(np.unique(np.concatenate(found)).tobytes() if found else b"")
    return prompts


def kept_apart(
    instances: Iterable[Instance], prompts: "array[int]", folders: Sequence[Path], tally: Tally, *, drop: bool
) -> Iterator[Instance]:
    """The instances without those of train and validation whose prompt stands in an evaluation set.

    They are dropped and counted, or refused: RecordError names the first.
    """
    for instance in instances:
        if prompts and instance.split != "test" and holds(prompts, prompt_hash(instance.instruction)):
            if not drop:
                where = ", ".join(map(str, folders))
                what = f"instance {shown(instance.instance_id)} of {instance.split} has a prompt that stands in {where}"
                raise RecordError(f"{what}; leave such instances out with --leaked drop, or mend the data")
            tally.counts["dropped_leaked"] += 1
            continue
        yield instance
