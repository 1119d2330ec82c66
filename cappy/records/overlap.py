"""Rows of one set that stand in the prompts of another, under whatever template: near-duplicates of their own text.

A prompt is taken as its shingles, hashes of three words in a row. What many prompts share is their template; what few
share is the text of the row. Of each row up to sixteen shingles of its own text are kept, drawn by their hash, and a
prompt that holds most of them holds the row. Rows of a few words have too few shingles to be known by.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import regex

from cappy.records.instance import prompt_hash

Hashes = npt.NDArray[np.uint64]

WORDS = 3
"""Words of a shingle; of text without spaces between words (Chinese, Japanese, Thai) each character is one."""
KEPT = 16
"""Shingles that are kept of a row."""
MAX_ROWS = 32_768
"""Rows that are kept, drawn by the hash of their prompt: 5 MB, of however many."""
MAX_SHINGLES = 512
"""Shingles of a prompt, from its beginning, of which those of its row are kept."""
MOST_PROMPTS = 10
"""A shingle in more groups than this is a template's."""
MIN_SHARED = 8
MIN_SHARE = 0.9
"""How many, and which share, of a row's shingles a prompt must hold."""
MIN_IN_GROUP = 2
"""How many of them where the two have the same task and group."""

_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|\w+")
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


class Prompted(Protocol):
    """What is looked at of an instance."""

    @property
    def instruction(self) -> str:
        """The prompt."""

    @property
    def task(self) -> str:
        """The name of its task."""

    @property
    def group_id(self) -> str:
        """The id of its group."""


class Prompt(NamedTuple):
    """A prompt without the rest of its instance."""

    instruction: str
    task: str = ""
    group_id: str = ""


def group_hash(prompted: Prompted) -> int:
    """64 bits of the task and the group; equal by chance for row numbers, so they prove nothing alone."""
    text = f"{prompted.task}\0{prompted.group_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_content(group_id: str) -> bool:
    """Whether a group's id is made of the row's content, as that of a row under templates: NAME:HASH."""
    return regex.search(r":[0-9a-f]{16}$", group_id) is not None


def shingles(text: str) -> Hashes:
    """The sorted, distinct shingles of a text; equal for texts that differ in case, marks and white space alone."""
    return np.unique(_in_order(text))


def _in_order(text: str) -> Hashes:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < WORDS:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(_hash, words), dtype=np.uint64, count=len(words))
    mixed = np.zeros(len(words) - WORDS + 1, dtype=np.uint64)
    for index in range(WORDS):
        mixed = (mixed ^ hashes[index : len(words) - WORDS + 1 + index]) * _FACTORS[index]
        mixed ^= mixed >> np.uint64(29)
    return mixed


@functools.lru_cache(maxsize=2**18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Rows:
    """What is kept of rows: for each one its group's hash and its shingles, padded with zeros; (rows, 1 + KEPT).

    `seen` counts the rows they were drawn from.
    """

    table: Hashes
    seen: int = 0

    @staticmethod
    def none() -> "Rows":
        """No rows."""
        return Rows(np.empty((0, 1 + KEPT), dtype=np.uint64))


@dataclass(slots=True)
class _Draw:
    """Rows as they come, those with the smallest hashes of prompts; a fourth more than `MAX_ROWS` are held at most."""

    held: list[tuple[int, int, Hashes]] = field(default_factory=list)
    seen: int = 0
    highest: int = 2**64

    def add(self, prompted: Prompted) -> None:
        self.seen += 1
        prompt = prompt_hash(prompted.instruction)
        if prompt >= self.highest:
            return
        self.held.append((prompt, group_hash(prompted), _in_order(prompted.instruction)[:MAX_SHINGLES]))
        if len(self.held) >= MAX_ROWS + MAX_ROWS // 4:
            self.cut()

    def cut(self) -> None:
        self.held.sort(key=lambda row: row[0])
        if len(self.held) > MAX_ROWS:
            self.highest = self.held[MAX_ROWS][0]
            del self.held[MAX_ROWS:]


def sketch_rows(prompts: Iterable[Prompted]) -> Rows:
    """What is kept of the rows of these prompts: the work is bounded where there are millions."""
    draw = _Draw()
    for prompted in prompts:
        draw.add(prompted)
    draw.cut()
    if not draw.held:
        return Rows.none()
    groups = np.array([group for _, group, _ in draw.held], dtype=np.uint64)
    lengths = np.array([len(found) for _, _, found in draw.held])
    flat = np.concatenate([found for _, _, found in draw.held])
    rare = _rare(flat, np.repeat(groups, lengths))
    rows = []
    for group, found in zip(groups, np.split(rare, np.cumsum(lengths)[:-1]), strict=True):
        kept = np.unique(_inside(found))[:KEPT]
        if len(kept) >= MIN_SHARED:
            rows.append(np.concatenate(([group], kept, np.zeros(KEPT - len(kept), dtype=np.uint64))))
    table = np.unique(np.array(rows, dtype=np.uint64), axis=0) if rows else Rows.none().table
    return Rows(table, draw.seen)


def _rare(flat: Hashes, groups: Hashes) -> Hashes:
    """The shingles with zeros in place of those that too many groups share."""
    distinct, codes = np.unique(flat, return_inverse=True)
    _, group_codes = np.unique(groups, return_inverse=True)
    pairs = np.unique(codes.astype(np.uint64) << np.uint64(32) | group_codes.astype(np.uint64))
    counts = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(distinct))
    return np.where(counts[codes] <= most_prompts(int(group_codes.max(initial=0)) + 1), flat, 0).astype(np.uint64)


def _inside(found: Hashes) -> Hashes:
    """The shingles of a prompt that are not zero, without those that are half the template's.

    Those stand beside two zeros in a row, or one at an end: under another template they would be others.
    """
    if not len(found):
        return found
    zero = found == 0
    template = np.zeros_like(zero)
    template[1:] |= zero[1:] & zero[:-1]
    template[:-1] |= zero[1:] & zero[:-1]
    template[[0, -1]] = zero[[0, -1]]
    beside = zero.copy()
    for step in range(1, WORDS):
        beside[step:] |= template[:-step]
        beside[:-step] |= template[step:]
    own: Hashes = found[~beside]
    return own


def most_prompts(groups: int) -> int:
    """In how many of so many groups a shingle may stand and still be a row's own."""
    return max(1, min(MOST_PROMPTS, groups // 4))


def merge_rows(first: Rows, second: Rows) -> Rows:
    """The rows of both, at most `MAX_ROWS`."""
    table = np.unique(np.concatenate((first.table, second.table)), axis=0)
    if len(table) > MAX_ROWS:
        table = table[np.argsort(table[:, 1], kind="stable")[:MAX_ROWS]]
    return Rows(table, first.seen + second.seen)


class RowIndex:
    """Finds rows in prompts."""

    def __init__(self, rows: Rows) -> None:
        self._groups = rows.table[:, 0]
        kept = rows.table[:, 1:]
        self._lengths = (kept > 0).sum(axis=1)
        numbers, columns = np.nonzero(kept)
        values = kept[numbers, columns]
        order = np.argsort(values, kind="stable")
        self._values, self._numbers = values[order], numbers[order]

    def holds(self, prompted: Prompted, frequent: Hashes | None = None) -> bool:
        """Whether a prompt holds a row, or a part of one of its own group; `frequent` shingles count for nothing."""
        found = shingles(prompted.instruction)
        if frequent is not None and len(frequent):
            found = np.setdiff1d(found, frequent, assume_unique=True)
        starts = np.searchsorted(self._values, found, side="left")
        ends = np.searchsorted(self._values, found, side="right")
        hit = ends > starts
        if not hit.any():
            return False
        spans = [self._numbers[start:end] for start, end in zip(starts[hit], ends[hit], strict=True)]
        rows, shared = np.unique(np.concatenate(spans), return_counts=True)
        near = (shared >= MIN_SHARED) & (shared >= MIN_SHARE * self._lengths[rows])
        same = (shared >= MIN_IN_GROUP) & (self._groups[rows] == np.uint64(group_hash(prompted)))
        return bool((near | same).any())


def frequent_shingles(prompts: Sequence[Prompted]) -> Hashes:
    """The sorted shingles that too many groups of these prompts share: their templates' text."""
    own: dict[int, list[Hashes]] = {}
    for prompted in prompts:
        own.setdefault(group_hash(prompted), []).append(shingles(prompted.instruction))
    if not own:
        return np.empty(0, dtype=np.uint64)
    found, counts = np.unique(
        np.concatenate([np.unique(np.concatenate(one)) for one in own.values()]), return_counts=True
    )
    return found[counts > max(2, most_prompts(len(own)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What is known of the prompts that a scorer was trained on, all of it hashes.

    `prompts` and `groups` are sorted; groups are those whose ids are made of their row's content. `rows` is None for a
    scorer that was made before rows were kept.
    """

    prompts: Hashes
    groups: Hashes
    rows: Rows | None

    def describe(self) -> dict[str, int | str]:
        """How much is known, and what can be seen by it."""
        if self.rows is None:
            return {"prompts": len(self.prompts), "sees": "equal prompts alone: the scorer keeps no groups and rows"}
        sees = "equal prompts, rows under another template, and near-duplicates of rows of ten words of their own"
        return {
            "prompts": len(self.prompts),
            "groups": len(self.groups),
            "rows": len(self.rows.table),
            "rows_drawn_from": self.rows.seen,
            "sees": sees,
        }
