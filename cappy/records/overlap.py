"""Finds the prompts of one dataset that contain most of the text of a row of another, whatever their templates.

A prompt is represented by its shingles: hashes of three consecutive words. Shingles that many prompts share belong to
their template, the others to the text of the row. For each row, up to sixteen of its own shingles are stored: those
with the smallest hashes. A prompt with most of them contains the row. Rows of a few words have too few shingles, so
they are never found.

A sketch of the groups that a model version was tested on is small enough for a tag in MLflow: the smallest hashes of
the set (bottom-k; Cohen and Kaplan, 2007). It is exact for up to `SKETCH_SIZE` groups; beyond that the overlap of two
sets is estimated with a standard error of about 2 %.
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

SHINGLE_WORDS = 3
"""Words per shingle; in text without spaces between words (Chinese, Japanese, Thai), each character is a word."""
ROW_SHINGLES = 16
"""Maximum number of stored shingles of a row."""
MAX_ROWS = 32_768
"""Maximum number of stored rows of a dataset: those whose prompts have the smallest hashes; 5 MB at any size."""
MAX_SHINGLES = 512
"""Number of shingles at the beginning of a prompt that are considered for its row."""
MAX_GROUPS = 10
"""A shingle in more groups than this belongs to a template."""
MIN_SHARED_SHINGLES = 8
MIN_SHARED_FRACTION = 0.9
"""Number and share of a row's shingles that a prompt must contain."""
MIN_SHARED_IN_GROUP = 2
"""The number of shared shingles that is enough if row and prompt have the same task and group."""

_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|\w+")
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


class PromptLike(Protocol):
    """The fields of an instance that the overlap depends on."""

    @property
    def instruction(self) -> str:
        """The prompt."""

    @property
    def task(self) -> str:
        """The name of its task."""

    @property
    def group_id(self) -> str:
        """The id of its group."""


class GroupedPrompt(NamedTuple):
    """A prompt with its task and group, without the rest of its instance."""

    instruction: str
    task: str = ""
    group_id: str = ""


def group_hash(prompt: PromptLike) -> int:
    """64-bit hash of task and group; group ids may be mere row numbers, so equal hashes alone prove nothing."""
    text = f"{prompt.task}\0{prompt.group_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_content_id(group_id: str) -> bool:
    """Whether a group id is a hash of the row's content (NAME:HASH), as for rows under templates."""
    return regex.search(r":[0-9a-f]{16}$", group_id) is not None


def shingles(text: str) -> Hashes:
    """The sorted, distinct shingles of a text, ignoring case, punctuation and white space."""
    return sorted_unique(_ordered_shingles(text))


def sorted_unique(values: Hashes) -> Hashes:
    """The sorted, distinct values; several times faster here than `np.unique`, which hashes."""
    ordered = np.sort(values)
    new = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


def _ordered_shingles(text: str) -> Hashes:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if len(words) < SHINGLE_WORDS:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    mixed = np.zeros(len(words) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for index in range(SHINGLE_WORDS):
        mixed = (mixed ^ hashes[index : len(words) - SHINGLE_WORDS + 1 + index]) * _FACTORS[index]
        mixed ^= mixed >> np.uint64(29)
    return mixed


@functools.lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Rows:
    """Stored rows: each line of `table`, uint64 (rows, 1 + ROW_SHINGLES), has a group's hash, then a row's shingles.

    Missing shingles are zeros. `total_rows` is the number of rows that the stored ones were sampled from.
    """

    table: Hashes
    total_rows: int = 0

    @staticmethod
    def empty() -> "Rows":
        """No rows."""
        return Rows(np.empty((0, 1 + ROW_SHINGLES), dtype=np.uint64))


class SampledRow(NamedTuple):
    """A row in a `RowSample`: the hashes of its prompt and its group, and its shingles."""

    prompt: int
    group: int
    shingles: Hashes


@dataclass(slots=True)
class RowSample:
    """A sample of a stream of rows: the `max_rows` rows whose prompts have the smallest hashes.

    Each row has its first `MAX_SHINGLES` shingles in order; with `all_shingles`, all of them, sorted and distinct. The
    sample has fewer rows if they have more than `max_rows * MAX_SHINGLES` shingles in total. Until `truncate`, up to a
    fourth more rows are in memory. `total_rows` counts all added rows, `num_shingles` the shingles in the sample.
    """

    max_rows: int
    all_shingles: bool = False
    rows: list[SampledRow] = field(default_factory=list)
    total_rows: int = 0
    hash_limit: int = 2**64
    num_shingles: int = 0

    def add(self, prompt: PromptLike) -> None:
        """Adds a row, unless the sample is full of rows with smaller hashes."""
        self.total_rows += 1
        hash_of_prompt = prompt_hash(prompt.instruction)
        if hash_of_prompt >= self.hash_limit:
            return
        hashes = (
            shingles(prompt.instruction) if self.all_shingles else _ordered_shingles(prompt.instruction)[:MAX_SHINGLES]
        )
        self.rows.append(SampledRow(hash_of_prompt, group_hash(prompt), hashes))
        self.num_shingles += len(hashes)
        has_many_shingles = self.num_shingles > self.max_rows * MAX_SHINGLES * 5 // 4
        if len(self.rows) >= self.max_rows + self.max_rows // 4 or has_many_shingles:
            self.truncate()

    def truncate(self) -> None:
        """Removes the rows beyond the limits; the others are sorted by the hash of their prompt."""
        self.rows.sort(key=lambda row: row.prompt)
        ends = np.cumsum([len(row.shingles) for row in self.rows], dtype=np.int64)
        count = min(self.max_rows, int(np.searchsorted(ends, self.max_rows * MAX_SHINGLES, side="right")))
        if len(self.rows) > count:
            self.hash_limit = self.rows[count].prompt
            del self.rows[count:]
        self.num_shingles = int(ends[count - 1]) if self.rows else 0


def sketch_rows(prompts: Iterable[PromptLike]) -> Rows:
    """The stored rows of these prompts; time and memory per row stay bounded for millions of prompts."""
    sample = RowSample(max_rows=MAX_ROWS)
    for prompt in prompts:
        sample.add(prompt)
    sample.truncate()
    _, table = own_shingles(sample.rows)
    return Rows(np.unique(table, axis=0) if len(table) else table, sample.total_rows)


def own_shingles(sampled: Sequence[SampledRow], only: Hashes | None = None) -> tuple[list[int], Hashes]:
    """Returns the indices of the rows that have enough shingles of their own, and a line of `Rows.table` for each.

    Rows with fewer than `MIN_SHARED_SHINGLES` shingles in `only` are skipped.
    """
    if not sampled:
        return [], Rows.empty().table
    groups = np.array([row.group for row in sampled], dtype=np.uint64)
    lengths = np.array([len(row.shingles) for row in sampled])
    flat = np.concatenate([row.shingles for row in sampled])
    ends = np.append(0, np.cumsum(lengths))
    eligible = lengths >= MIN_SHARED_SHINGLES
    if only is not None:
        hits = np.append(0, np.cumsum(_is_in_sorted(flat, only)))
        eligible = hits[ends[1:]] - hits[ends[:-1]] >= MIN_SHARED_SHINGLES
    if not eligible.any():
        return [], Rows.empty().table
    rare = _zero_frequent(flat, np.repeat(groups, lengths))
    indices, rows = [], []
    for index in np.flatnonzero(eligible).tolist():
        own = sorted_unique(_drop_template_neighbours(rare[ends[index] : ends[index + 1]]))[:ROW_SHINGLES]
        if len(own) >= MIN_SHARED_SHINGLES:
            indices.append(index)
            rows.append(np.concatenate((groups[index : index + 1], own, np.zeros(ROW_SHINGLES - len(own), np.uint64))))
    return indices, np.array(rows, dtype=np.uint64) if rows else Rows.empty().table


def _is_in_sorted(values: Hashes, ordered: Hashes) -> npt.NDArray[np.bool_]:
    """Mask of the values that are in a sorted array; faster than `np.isin`, which sorts both."""
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    is_in: npt.NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return is_in


def exclude(values: Hashes, ordered: Hashes) -> Hashes:
    """The values that are not in a sorted array."""
    return values[~_is_in_sorted(values, ordered)]


def _zero_frequent(flat: Hashes, groups: Hashes) -> Hashes:
    """The shingles, with zeros for those that too many groups share."""
    unique, codes = np.unique(flat, return_inverse=True)
    _, group_codes = np.unique(groups, return_inverse=True)
    pairs = sorted_unique(codes.astype(np.uint64) << np.uint64(32) | group_codes.astype(np.uint64))
    counts = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(unique))
    return np.where(counts[codes] <= _max_groups(int(group_codes.max(initial=0)) + 1), flat, 0).astype(np.uint64)


def _drop_template_neighbours(hashes: Hashes) -> Hashes:
    """The nonzero shingles of a prompt, without those that overlap the template and so depend on it.

    These are next to two consecutive zeros, or to a zero at either end.
    """
    if not len(hashes):
        return hashes
    zero = hashes == 0
    template = np.zeros_like(zero)
    template[1:] |= zero[1:] & zero[:-1]
    template[:-1] |= zero[1:] & zero[:-1]
    template[[0, -1]] = zero[[0, -1]]
    to_drop = zero.copy()
    for step in range(1, SHINGLE_WORDS):
        to_drop[step:] |= template[:-step]
        to_drop[:-step] |= template[step:]
    own: Hashes = hashes[~to_drop]
    return own


def _max_groups(groups: int) -> int:
    """The maximum number of groups, out of `groups`, that a row's shingle may appear in."""
    return max(1, min(MAX_GROUPS, groups // 4))


def merge_rows(first: Rows, second: Rows) -> Rows:
    """The rows of both, at most `MAX_ROWS`."""
    table = np.unique(np.concatenate((first.table, second.table)), axis=0)
    if len(table) > MAX_ROWS:
        table = table[np.argsort(table[:, 1], kind="stable")[:MAX_ROWS]]
    return Rows(table, first.total_rows + second.total_rows)


class RowIndex:
    """Finds the stored rows that a prompt contains."""

    def __init__(self, rows: Rows) -> None:
        self._groups = rows.table[:, 0]
        stored = rows.table[:, 1:]
        self._lengths = (stored > 0).sum(axis=1)
        indices, columns = np.nonzero(stored)
        values = stored[indices, columns]
        order = np.argsort(values, kind="stable")
        self._values, self._indices = values[order], indices[order]

    def has_row_in(self, prompt: PromptLike, frequent: Hashes | None = None) -> bool:
        """Whether a prompt contains a row, or part of a row of its own group; `frequent` shingles are ignored."""
        return len(self.match(shingles(prompt.instruction), group_hash(prompt), frequent)) > 0

    def match(
        self, prompt: Hashes, group: int, frequent: Hashes | None = None, share: float = MIN_SHARED_FRACTION
    ) -> npt.NDArray[np.intp]:
        """Indices of the rows that a prompt contains: `share` of their shingles, or two if their group is the same.

        `prompt` has the distinct shingles of the prompt, `group` is its group hash; `frequent` shingles are ignored.
        """
        if frequent is not None:
            prompt = exclude(prompt, frequent)
        starts = np.searchsorted(self._values, prompt, side="left")
        ends = np.searchsorted(self._values, prompt, side="right")
        hit = ends > starts
        if not hit.any():
            return np.empty(0, dtype=np.intp)
        spans = [self._indices[start:end] for start, end in zip(starts[hit], ends[hit], strict=True)]
        rows, shared = np.unique(np.concatenate(spans), return_counts=True)
        near = (shared >= MIN_SHARED_SHINGLES) & (shared >= share * self._lengths[rows])
        same_group = (shared >= MIN_SHARED_IN_GROUP) & (self._groups[rows] == np.uint64(group))
        matches: npt.NDArray[np.intp] = rows[near | same_group]
        return matches


def frequent_shingles(prompts: Sequence[PromptLike]) -> Hashes:
    """The sorted shingles that too many groups of these prompts share, which belong to templates."""
    return frequent_hashes((group_hash(prompt), shingles(prompt.instruction)) for prompt in prompts)


def frequent_hashes(prompts: Iterable[tuple[int, Hashes]]) -> Hashes:
    """Like `frequent_shingles`, for prompts as pairs of group hash and distinct shingles."""
    by_group: dict[int, list[Hashes]] = {}
    for group, hashes in prompts:
        by_group.setdefault(group, []).append(hashes)
    if not by_group:
        return np.empty(0, dtype=np.uint64)
    hashes, counts = np.unique(
        np.concatenate(
            [arrays[0] if len(arrays) == 1 else sorted_unique(np.concatenate(arrays)) for arrays in by_group.values()]
        ),
        return_counts=True,
    )
    return hashes[counts > max(2, _max_groups(len(by_group)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Hashes of the prompts, groups and rows that a scorer was trained on.

    `prompts` and `groups` are sorted; `groups` has only ids that are hashes of the row's content. `rows` is None for
    scorers of earlier releases, which did not store rows.
    """

    prompts: Hashes
    groups: Hashes
    rows: Rows | None

    def describe(self) -> dict[str, int | str]:
        """Sizes of the stored hashes, and what they can detect."""
        if self.rows is None:
            return {"prompts": len(self.prompts), "sees": "only equal prompts: the scorer stores no groups and rows"}
        sees = "equal prompts, rows under another template, and near-duplicates of rows with ten words of their own"
        return {
            "prompts": len(self.prompts),
            "groups": len(self.groups),
            "rows": len(self.rows.table),
            "rows_drawn_from": self.rows.total_rows,
            "sees": sees,
        }


SKETCH_SIZE = 512
_DIGITS = 8
_MIN_ID_LENGTH = 8
"""Minimum length of a group id that identifies the row; a shorter one may be a row number."""


def sketch(instances: Iterable[Instance]) -> str:
    """The sketch of the groups of these instances: ascending hashes of 8 hexadecimal digits each."""
    return _join_hashes({_sketch_hash(instance) for instance in instances})


def merge_sketches(first: str, second: str) -> str:
    """The sketch of the union of the groups."""
    return _join_hashes(set(_split_hashes(first)) | set(_split_hashes(second)))


def sketch_overlap(current: str, earlier: str) -> float:
    """The share, 0 to 1, of the groups of `current` that are in `earlier` too."""
    hashes, earlier_hashes = _split_hashes(current), _split_hashes(earlier)
    if not hashes or not earlier_hashes:
        return 0.0
    # A truncated sketch says nothing beyond its largest hash. All hexadecimal digits are below "g".
    limit = min((sketch[-1] for sketch in (hashes, earlier_hashes) if len(sketch) == SKETCH_SIZE), default="g")
    compared = [value for value in hashes if value <= limit]
    return len(set(compared) & set(earlier_hashes)) / len(compared) if compared else 0.0


def _sketch_hash(instance: Instance) -> str:
    has_id = len(instance.group_id) >= _MIN_ID_LENGTH
    identity = instance.group_id if has_id else f"{prompt_hash(instance.instruction):016x}"
    return hashlib.sha256(identity.encode()).hexdigest()[:_DIGITS]


def _join_hashes(hashes: set[str]) -> str:
    return "".join(sorted(hashes)[:SKETCH_SIZE])


def _split_hashes(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]
