"""Instances as token ids on disk: tokenized once, memory-mapped, so that memory does not grow with rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cappy.records.instance import SOURCES, Source
from cappy.scoring.encoding import Encoded, PairEncoder

FACTS = "facts.json"
COUNTED = 2**16
"""Instances whose lengths are in memory at a time while the cut pairs are counted."""
FILES: Mapping[str, str] = {
    "tokens": "<u4",  # of each instance: the instruction's, then each response's
    "text_ends": "<u8",  # where each text ends in `tokens`
    "pair_ends": "<u8",  # where each instance ends in `labels`
    "labels": "<f8",
    "selectable": "<u1",
    "sources": "<u1",  # of each response, its place in SOURCES
    "names": "<u1",  # instance ids, UTF-8
    "name_ends": "<u8",
}
"""The arrays of a corpus and their types; `tokens` is narrower where the vocabulary allows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a corpus beside its arrays: instances, longest response and instruction, range of labels."""

    instances: int = 0
    pairs: int = 0
    longest_instruction: int = 0
    longest_response: int = 0
    lowest: float = 1.0
    highest: float = 0.0
    token_type: str = FILES["tokens"]


class Corpus:
    """Instances of one split, by number: their responses as token ids, labels, and what a selector may pick."""

    def __init__(self, folder: Path, encoder: PairEncoder) -> None:
        self.facts = Facts(**json.loads((folder / FACTS).read_text()))
        self._encoder = encoder
        kinds = {**FILES, "tokens": self.facts.token_type}
        arrays = {name: mapped(folder / name, kind) for name, kind in kinds.items()}
        self._tokens, self._text_ends, self._pair_ends = (arrays[n] for n in ("tokens", "text_ends", "pair_ends"))
        self._labels, self._selectable, self._sources = (arrays[n] for n in ("labels", "selectable", "sources"))
        self._names, self._name_ends = arrays["names"], arrays["name_ends"]

    def __len__(self) -> int:
        return self.facts.instances

    def size(self, index: int) -> int:
        """Responses of an instance."""
        return int(self._pair_ends[index]) - _start(self._pair_ends, index)

    def drawable(self, most: int) -> int:
        """Responses that one pass draws, at most `most` of each instance."""
        return int(np.minimum(np.diff(self._pair_ends, prepend=np.uint64(0)), most).sum())

    def name(self, index: int) -> str:
        """The instance's id."""
        start, end = _start(self._name_ends, index), int(self._name_ends[index])
        return bytes(self._names[start:end]).decode()

    def labels(self, index: int, chosen: Sequence[int]) -> list[float]:
        """Labels of these responses, 0 to 1."""
        start = _start(self._pair_ends, index)
        return [float(self._labels[start + number]) for number in chosen]

    def sources(self, index: int, chosen: Sequence[int]) -> list[Source]:
        """Where these responses came from."""
        start = _start(self._pair_ends, index)
        return [SOURCES[self._sources[start + number]] for number in chosen]

    def selectable(self, index: int) -> list[int]:
        """Numbers of the responses that a selector may pick."""
        start, end = _start(self._pair_ends, index), int(self._pair_ends[index])
        return [int(number) for number in np.flatnonzero(self._selectable[start:end])]

    def pairs(self, index: int, chosen: Sequence[int]) -> list[Encoded]:
        """The instruction with each of these responses, as the model reads them."""
        first = _start(self._pair_ends, index) + index  # every instance before has its responses and one instruction
        instruction = self._text(first)
        return [self._encoder.join(instruction, self._text(first + 1 + number)) for number in chosen]

    def tokens(self, index: int, chosen: Sequence[int]) -> list[int]:
        """Tokens of each of these pairs, as the model reads them."""
        first = _start(self._pair_ends, index) + index
        around = self._encoder.added + self._length(first)
        return [min(self._encoder.max_length, around + self._length(first + 1 + number)) for number in chosen]

    def longest(self, index: int, chosen: Sequence[int]) -> int:
        """Tokens of the longest of these pairs."""
        return max(self.tokens(index, chosen))

    @property
    def longest_pair(self) -> int:
        """A bound on the tokens of any pair."""
        whole = self._encoder.added + self.facts.longest_instruction + self.facts.longest_response
        return min(self._encoder.max_length, whole)

    @property
    def cut_pairs(self) -> int:
        """How many pairs have more tokens than the scorer reads."""
        return sum(self._cut(start, min(start + COUNTED, len(self))) for start in range(0, len(self), COUNTED))

    def _cut(self, start: int, stop: int) -> int:
        """The same of the instances from `start` to before `stop`."""
        ends = self._pair_ends[start:stop].astype(np.int64)
        sizes = np.diff(ends, prepend=_start(self._pair_ends, start))
        first, last = _start(self._pair_ends, start) + start, int(ends[-1]) + stop
        lengths = np.diff(self._text_ends[first:last].astype(np.int64), prepend=_start(self._text_ends, first))
        instructions = np.cumsum(sizes + 1) - (sizes + 1)
        pairs = np.delete(lengths, instructions) + np.repeat(lengths[instructions], sizes)
        return int((pairs + self._encoder.added > self._encoder.max_length).sum())

    def _text(self, number: int) -> list[int]:
        ids: list[int] = self._tokens[_start(self._text_ends, number) : int(self._text_ends[number])].tolist()
        return ids

    def _length(self, number: int) -> int:
        return int(self._text_ends[number]) - _start(self._text_ends, number)


def mapped(path: Path, kind: str) -> NDArray[Any]:
    """The numbers of a file, read from the disk as they are used."""
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.empty(0, dtype=kind)


def _start(ends: NDArray[np.uint64], index: int) -> int:
    return int(ends[index - 1]) if index else 0
