"""A row is known again under another template, and other rows under the same one are not."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cappy.records import overlap
from cappy.records.overlap import GroupedPrompt, RowIndex, frequent_shingles, merge_rows, shingles, sketch_rows

FIRST = "Here is a short passage for you to read with care: {} Now say in one sentence what it is about."
SECOND = "Summarise. {} Summary:"
SYLLABLES = ("ka", "lo", "mi", "ru", "ta", "zo", "be", "du")
WORDS = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]


def texts(count: int, length: int = 20, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def prompts(template: str, rows: Sequence[str], group: Callable[[int], str] = str) -> list[GroupedPrompt]:
    return [GroupedPrompt(template.format(row), "task", group(number)) for number, row in enumerate(rows)]


def matches(trained: Sequence[GroupedPrompt], tested: Sequence[GroupedPrompt]) -> list[bool]:
    index, frequent = RowIndex(sketch_rows(trained)), frequent_shingles(tested)
    return [index.has_row_in(one, frequent) for one in tested]


def none(number: int) -> str:
    return f"other {number}"


@pytest.mark.parametrize("length", [12, 20, 80])
def test_a_row_is_detected_under_another_template_and_with_other_marks(length: int) -> None:
    rows = texts(60, length)
    trained = prompts(FIRST, rows)
    assert all(matches(trained, prompts(SECOND, rows, none)))
    assert all(matches(trained, prompts(SECOND, [row.upper().replace(" ", ",  ") for row in rows], none)))
    both = [*trained, *prompts("Q: {} A:", rows, lambda number: f"again {number}")]
    assert all(matches(both, prompts(SECOND, rows, none)))


def test_other_rows_under_the_same_template_are_missing() -> None:
    trained, others = texts(300), texts(300, seed=1)
    assert not any(matches(prompts(FIRST, trained), prompts(FIRST, others, none)))


def test_a_row_with_many_other_words_is_another_row() -> None:
    rows = texts(60, 30)
    edited = [" ".join(["other" if n % 10 == 4 else word for n, word in enumerate(row.split())]) for row in rows]
    assert not any(matches(prompts(FIRST, rows), prompts(FIRST, edited, none)))


@pytest.mark.parametrize("length", [1, 3, 6])
def test_short_rows_under_a_long_template_are_no_alarm(length: int) -> None:
    trained, others = texts(200, length), texts(200, length, seed=1)
    assert not any(matches(prompts(FIRST, trained), prompts(FIRST, others, none)))


@pytest.mark.parametrize("count", [4, 8, 12, 40])
def test_few_rows_under_one_template_are_no_alarm(count: int) -> None:
    assert not any(matches(prompts(FIRST, texts(count, 8)), prompts(FIRST, texts(count, 8, seed=1), none)))


def test_half_a_row_is_another_row_unless_it_is_of_the_same_group() -> None:
    rows = texts(60, 40)
    halves = [row[: len(row) // 2] + other for row, other in zip(rows, texts(60, 20, seed=3), strict=True)]
    assert not any(matches(prompts(FIRST, rows), prompts(SECOND, halves, none)))
    assert all(matches(prompts(FIRST, rows), prompts(SECOND, halves)))


def test_groups_that_are_equal_by_chance_are_no_alarm() -> None:
    # Row numbers of two sources under one task name.
    assert not any(matches(prompts(FIRST, texts(300)), prompts(FIRST, texts(300, seed=1))))


def test_text_without_spaces_between_words_is_known_by_its_characters() -> None:
    rng = random.Random(0)
    rows = ["".join(chr(0x4E00 + rng.randrange(3_000)) for _ in range(30)) for _ in range(80)]
    trained, others = rows[:40], rows[40:]
    assert all(matches(prompts("请总结：{}", trained), prompts("概要 {}", trained, none)))
    assert not any(matches(prompts("请总结：{}", trained), prompts("请总结：{}", others, none)))


def test_what_is_kept_is_bounded_and_drawn_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_ROWS", 100)
    rows = prompts(FIRST, texts(2_000))
    kept = sketch_rows(rows)
    assert kept.total_rows == 2_000
    assert 50 <= len(kept.table) <= 100
    assert np.array_equal(kept.table, sketch_rows(reversed(rows)).table)
    more = merge_rows(kept, sketch_rows(prompts(FIRST, texts(2_000, seed=1))))
    assert (more.total_rows, len(more.table)) == (4_000, 100)


def test_nothing_comes_of_nothing() -> None:
    assert len(sketch_rows([]).table) == 0
    assert len(shingles("two words")) == 0
    assert len(frequent_shingles([])) == 0
    assert matches([], prompts(FIRST, ["a b c d"])) == [False]


def test_ten_thousand_rows_take_a_few_megabytes_and_seconds(tmp_path: Path) -> None:
    rows = prompts(FIRST, texts(10_000, 60))
    started = time.monotonic()
    kept = sketch_rows(rows)
    assert time.monotonic() - started < 120  # about 3 s on one core
    assert kept.table.nbytes < 1_500_000
    started = time.monotonic()
    index = RowIndex(kept)
    assert sum(index.has_row_in(one) for one in prompts(SECOND, texts(1_000, 60), none)) > 950
    assert time.monotonic() - started < 60
