"""Rows of one set that stand in the prompts of another, under whatever template: near-duplicates of their own text.

A prompt is taken as its shingles, hashes of three words in a row. What many prompts share is their template; what few
share is the text of the row. Of each row up to sixteen shingles of its own text are kept, drawn by their hash, and a
prompt that holds most of them holds the row. Rows of a few words have too few shingles to be known by.

Of the groups that a version was tested on a sketch is kept that fits into a tag: the smallest hashes of the set
(bottom-k; Cohen and Kaplan, 2007). Up to `SKETCH_SIZE` groups are all there, and of more the share that two sets have
in common is estimated with a standard error of about 2 %.
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

from cappy.records.instance import Instance, prompt_hash

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


class PromptLike(Protocol):
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


def group_hash(prompted: PromptLike) -> int:
    """64 bits of the task and the group; equal by chance for row numbers, so they prove nothing alone."""
    text = f"{prompted.task}\0{prompted.group_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_content_id(group_id: str) -> bool:
    """Whether a group's id is made of the row's content, as that of a row under templates: NAME:HASH."""
    return regex.search(r":[0-9a-f]{16}$", group_id) is not None


def shingles(text: str) -> Hashes:
    """The sorted, distinct shingles of a text; equal for texts that differ in case, marks and white space alone."""
    return sorted_unique(_ordered_shingles(text))


def sorted_unique(values: Hashes) -> Hashes:
    """The values sorted, each once; by sorting, which is several times faster here than the hashing of `np.unique`."""
    ordered = np.sort(values)
    new = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def _ordered_shingles(text: str) -> Hashes:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < WORDS:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    mixed = np.zeros(len(words) - WORDS + 1, dtype=np.uint64)
    for index in range(WORDS):
        mixed = (mixed ^ hashes[index : len(words) - WORDS + 1 + index]) * _FACTORS[index]
        mixed ^= mixed >> np.uint64(29)
    return mixed


@functools.lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
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


class SampledRow(NamedTuple):
    """A row as it is held: hashes of its prompt and of its group, and its shingles."""

    prompt: int
    group: int
    shingles: Hashes


@dataclass(slots=True)
class RowSample:
    """Rows as they come, the `most` with the smallest hashes of prompts; a fourth more are held at most.

    Of each the first `MAX_SHINGLES` shingles are kept in order, or all of them, sorted and distinct, where it is
    `whole`; fewer rows are held where they have more than `most` times `MAX_SHINGLES` shingles in all.
    """

    most: int
    whole: bool = False
    held: list[SampledRow] = field(default_factory=list)
    seen: int = 0
    highest: int = 2**64
    size: int = 0

    def add(self, prompted: PromptLike) -> None:
        """Takes a row, unless those that are held have smaller hashes."""
        self.seen += 1
        prompt = prompt_hash(prompted.instruction)
        if prompt >= self.highest:
            return
        hashes = shingles(prompted.instruction) if self.whole else _ordered_shingles(prompted.instruction)[:MAX_SHINGLES]
        self.held.append(SampledRow(prompt, group_hash(prompted), hashes))
        self.size += len(hashes)
        if len(self.held) >= self.most + self.most // 4 or self.size > self.most * MAX_SHINGLES * 5 // 4:
            self.cut()

    def cut(self) -> None:
        """Lets go of what is beyond the bounds; the rows stand in the order of their prompts' hashes."""
        self.held.sort(key=lambda row: row.prompt)
        ends = np.cumsum([len(row.shingles) for row in self.held], dtype=np.int64)
        count = min(self.most, int(np.searchsorted(ends, self.most * MAX_SHINGLES, side="right")))
        if len(self.held) > count:
            self.highest = self.held[count].prompt
            del self.held[count:]
        self.size = int(ends[count - 1]) if self.held else 0


def sketch_rows(prompts: Iterable[PromptLike]) -> Rows:
    """What is kept of the rows of these prompts: the work is bounded where there are millions."""
    draw = RowSample(most=MAX_ROWS)
    for prompted in prompts:
        draw.add(prompted)
    draw.cut()
    _, table = own_shingles(draw.held)
    return Rows(np.unique(table, axis=0) if len(table) else table, draw.seen)


def own_shingles(drawn: Sequence[SampledRow], only: Hashes | None = None) -> tuple[list[int], Hashes]:
    """What is kept of these rows as in `Rows`, a line for each that has enough; and which of `drawn` each line is.

    A row with fewer than `MIN_SHARED` shingles among those of `only` is passed over.
    """
    if not drawn:
        return [], Rows.none().table
    groups = np.array([row.group for row in drawn], dtype=np.uint64)
    lengths = np.array([len(row.shingles) for row in drawn])
    flat = np.concatenate([row.shingles for row in drawn])
    ends = np.append(0, np.cumsum(lengths))
    wanted = lengths >= MIN_SHARED
    if only is not None:
        hits = np.append(0, np.cumsum(_is_in_sorted(flat, only)))
        wanted = hits[ends[1:]] - hits[ends[:-1]] >= MIN_SHARED
    if not wanted.any():
        return [], Rows.none().table
    rare = _zero_frequent(flat, np.repeat(groups, lengths))
    numbers, rows = [], []
    for number in np.flatnonzero(wanted).tolist():
        kept = sorted_unique(_drop_template_neighbours(rare[ends[number] : ends[number + 1]]))[:KEPT]
        if len(kept) >= MIN_SHARED:
            numbers.append(number)
            rows.append(np.concatenate((groups[number : number + 1], kept, np.zeros(KEPT - len(kept), np.uint64))))
    return numbers, np.array(rows, dtype=np.uint64) if rows else Rows.none().table


def _is_in_sorted(values: Hashes, ordered: Hashes) -> npt.NDArray[np.bool_]:
    """Which values are among sorted ones; quicker than `np.isin`, which sorts both anew."""
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    is_in: npt.NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return is_in


def exclude(values: Hashes, ordered: Hashes) -> Hashes:
    """The values that are not among sorted ones."""
    return values[~_is_in_sorted(values, ordered)]


def _zero_frequent(flat: Hashes, groups: Hashes) -> Hashes:
    """The shingles with zeros in place of those that too many groups share."""
    known, codes = np.unique(flat, return_inverse=True)
    _, group_codes = np.unique(groups, return_inverse=True)
    pairs = sorted_unique(codes.astype(np.uint64) << np.uint64(32) | group_codes.astype(np.uint64))
    counts = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(known))
    return np.where(counts[codes] <= _max_prompts(int(group_codes.max(initial=0)) + 1), flat, 0).astype(np.uint64)


def _drop_template_neighbours(hashes: Hashes) -> Hashes:
    """The shingles of a prompt that are not zero, without those that are half the template's.

    Those stand beside two zeros in a row, or one at an end: under another template they would be others.
    """
    if not len(hashes):
        return hashes
    zero = hashes == 0
    template = np.zeros_like(zero)
    template[1:] |= zero[1:] & zero[:-1]
    template[:-1] |= zero[1:] & zero[:-1]
    template[[0, -1]] = zero[[0, -1]]
    beside = zero.copy()
    for step in range(1, WORDS):
        beside[step:] |= template[:-step]
        beside[:-step] |= template[step:]
    own: Hashes = hashes[~beside]
    return own


def _max_prompts(groups: int) -> int:
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

    def holds(self, prompted: PromptLike, frequent: Hashes | None = None) -> bool:
        """Whether a prompt holds a row, or a part of one of its own group; `frequent` shingles count for nothing."""
        return len(self.match(shingles(prompted.instruction), group_hash(prompted), frequent)) > 0

    def match(
        self, prompt: Hashes, group: int, frequent: Hashes | None = None, share: float = MIN_SHARE
    ) -> npt.NDArray[np.intp]:
        """The numbers of the rows that a prompt of these shingles and this group's hash holds; see `holds`."""
        if frequent is not None:
            prompt = exclude(prompt, frequent)
        starts = np.searchsorted(self._values, prompt, side="left")
        ends = np.searchsorted(self._values, prompt, side="right")
        hit = ends > starts
        if not hit.any():
            return np.empty(0, dtype=np.intp)
        spans = [self._numbers[start:end] for start, end in zip(starts[hit], ends[hit], strict=True)]
        rows, shared = np.unique(np.concatenate(spans), return_counts=True)
        near = (shared >= MIN_SHARED) & (shared >= share * self._lengths[rows])
        same = (shared >= MIN_IN_GROUP) & (self._groups[rows] == np.uint64(group))
        numbers: npt.NDArray[np.intp] = rows[near | same]
        return numbers


def frequent_shingles(prompts: Sequence[PromptLike]) -> Hashes:
    """The sorted shingles that too many groups of these prompts share: their templates' text."""
    return frequent_hashes((group_hash(prompted), shingles(prompted.instruction)) for prompted in prompts)


def frequent_hashes(prompts: Iterable[tuple[int, Hashes]]) -> Hashes:
    """`frequent_shingles` of prompts that are given as their groups' hashes and their distinct shingles."""
    own: dict[int, list[Hashes]] = {}
    for group, hashes in prompts:
        own.setdefault(group, []).append(hashes)
    if not own:
        return np.empty(0, dtype=np.uint64)
    hashes, counts = np.unique(
        np.concatenate([one[0] if len(one) == 1 else sorted_unique(np.concatenate(one)) for one in own.values()]),
        return_counts=True,
    )
    return hashes[counts > max(2, _max_prompts(len(own)))]


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


SKETCH_SIZE = 512
_DIGITS = 8
_IDENTITY = 8
"""Characters from which on a group's id is taken to name the row: a shorter one may be its number in some file."""


def sketch(instances: Iterable[Instance]) -> str:
    """The sketch of the groups of these instances: hashes of 8 hexadecimal digits each, in ascending order."""
    return _join_hashes({_group_hash(instance) for instance in instances})


def merge_sketches(one: str, other: str) -> str:
    """The sketch of the groups of both."""
    return _join_hashes(set(_split_hashes(one)) | set(_split_hashes(other)))


def sketch_overlap(current: str, earlier: str) -> float:
    """The share, 0 to 1, of the groups of `current` that `earlier` has too."""
    own, others = _split_hashes(current), _split_hashes(earlier)
    if not own or not others:
        return 0.0
    # Of a set that was cut nothing is known beyond its highest hash.
    known = min((hashes[-1] for hashes in (own, others) if len(hashes) == SKETCH_SIZE), default="g")
    compared = [one for one in own if one <= known]
    return len(set(compared) & set(others)) / len(compared) if compared else 0.0


def _group_hash(instance: Instance) -> str:
    named = len(instance.group_id) >= _IDENTITY
    identity = instance.group_id if named else f"{prompt_hash(instance.instruction):016x}"
    return hashlib.sha256(identity.encode()).hexdigest()[:_DIGITS]


def _join_hashes(hashes: set[str]) -> str:
    return "".join(sorted(hashes)[:SKETCH_SIZE])


def _split_hashes(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]
