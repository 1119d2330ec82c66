"""Splits are by group, seeded, stable and never empty, and share no prompt."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import raises_naming

from cappy.errors import ConfigError
from cappy.preparation.rows import SourceRow, hash64
from cappy.preparation.sources import Source
from cappy.preparation.splits import apply_splits, assign_splits, draw_splits, merge_groups
from cappy.preparation.step import PreparationConfig
from cappy.progress import silent
from cappy.records import Instance, prompt_hash

rows_of_groups = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=60)


def config(**settings: Any) -> PreparationConfig:
    return PreparationConfig(target=Path("t"), **settings)


def split(pairs: list[tuple[str, str]], **settings: Any) -> list[Instance]:
    """The instances of (group, instruction) pairs, ids and splits left to the step."""

    def rows() -> Iterator[SourceRow]:
        for number, (group, instruction) in enumerate(pairs):
            instance = Instance(instance_id="", group_id=group, instruction=instruction, references=("r",))
            yield SourceRow(f"row {number}", instance, has_id=False, has_split=False)

    plan = assign_splits(Source(name="rows", format="", rows=rows), config(**settings), silent)
    result = list(apply_splits(rows(), plan))
    kept = [instance for instance in result if instance is not None]
    assert len(kept) == len(result), "none is left out"
    return kept


def numbered(count: int) -> list[tuple[str, str]]:
    return [(f"g{number}", f"Instruction {number}") for number in range(count)]


@given(rows_of_groups, st.integers())
def test_splits_share_no_group_and_no_prompt_whatever_the_groups_are(pairs: list[tuple[int, int]], seed: int) -> None:
    texts = [
        (f"g{group}", "Add  ONE" + " !" * prompt if group % 2 else "add one" + " !" * prompt) for group, prompt in pairs
    ]
    lone = [(f"lone{number}", f"Alone {number}") for number in range(3)]
    instances = split([*texts, *lone], seed=seed)
    for key in (lambda i: i.group_id, lambda i: prompt_hash(i.instruction)):
        homes: dict[Any, set[str]] = {}
        for instance in instances:
            homes.setdefault(key(instance), set()).add(instance.split)
        assert all(len(splits) == 1 for splits in homes.values())
    assert {instance.split for instance in instances} == {"train", "validation", "test"}
    assert len({instance.instance_id for instance in instances}) == len(instances)


@given(
    st.integers(3, 40), st.integers(0, 2**70), st.sampled_from([(0.2, 0.1), (0.98, 0.01), (0.001, 0.001), (0.01, 0.98)])
)
def test_three_groups_are_enough_for_three_splits(count: int, seed: int, shares: tuple[float, float]) -> None:
    test, validation = shares
    result = {instance.split for instance in split(numbered(count), seed=seed, test=test, validation=validation)}
    assert result == {"train", "validation", "test"}


def test_a_split_of_fraction_nothing_stays_empty() -> None:
    assert {instance.split for instance in split(numbered(1), test=0, validation=0)} == {"train"}
    assert {instance.split for instance in split(numbered(9), test=0)} == {"train", "validation"}
    assert {instance.split for instance in split(numbered(9), validation=0)} == {"train", "test"}


def test_adding_rows_moves_no_row_and_renames_none() -> None:
    pairs = numbered(300)
    before = split([*pairs, *pairs[:50]])
    after = split([*pairs, *pairs[:50], *numbered(900)[300:], *pairs])
    assert after[: len(before)] == before


def test_another_seed_draws_another_test_split() -> None:
    first, second = ({i.group_id for i in split(numbered(300), seed=s) if i.split == "test"} for s in (0, 1))
    assert len(first & second) < 0.5 * len(first)


def test_the_order_of_the_rows_does_not_matter() -> None:
    forwards, backwards = split(numbered(50)), split(numbered(50)[::-1])
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("tied", [1, 3])
def test_fractions_hold_for_lone_groups_and_for_groups_tied_by_prompts(tied: int) -> None:
    pairs = [(f"g{number}", f"Instruction {number // tied}") for number in range(6_000)]
    counts = Counter(instance.split for instance in split(pairs))
    assert counts["test"] / 6_000 == pytest.approx(0.2, abs=0.03)
    assert counts["validation"] / 6_000 == pytest.approx(0.1, abs=0.03)


@given(rows_of_groups)
def test_tied_groups_have_one_representative_and_others_keep_their_own(pairs: list[tuple[int, int]]) -> None:
    groups, prompts = (
        np.array([hash64(str(value)) for value in values], dtype=np.uint64) for values in zip(*pairs, strict=True)
    )
    result = merge_groups(groups, prompts).tolist()
    component: dict[int, set[int]] = {}
    for group, prompt in zip(groups.tolist(), prompts.tolist(), strict=True):
        merged = {group, -prompt}.union(*(component.get(key, set()) for key in (group, -prompt)))
        component.update(dict.fromkeys(merged, merged))
    for one, mine in zip(groups.tolist(), result, strict=True):
        assert mine in component[one]
        for other, theirs in zip(groups.tolist(), result, strict=True):
            assert (mine == theirs) == (component[one] is component[other])


def test_instances_of_a_group_are_numbered_in_their_order() -> None:
    ids = [i.instance_id for i in split([("a", "x"), ("b", "y"), ("a", "z"), ("c", "w"), ("a", "x")])]
    assert ids == ["a-0", "b-0", "a-1", "c-0", "a-2"]


def test_too_few_groups_are_refused_with_the_number_that_is_needed() -> None:
    places = np.array([1, 1, 1], dtype=np.uint64)
    with raises_naming(ConfigError, "in.jsonl: 1 group(s)", "2 splits", "at least 2", "--test 0", "--validation 0"):
        draw_splits(places, config(validation=0), "in.jsonl")


def test_places_are_the_same_on_every_machine() -> None:
    assert hash64("a") == 0x40F89E395B66422F
    assert "".join(instance.split[1] for instance in split(numbered(20))) == "rerrarrrrrrrrreerrrr"
    places = [hash64(f"0 g{number}") / 2**64 for number in range(20)]
    assert "".join("e" if place < 0.2 else "a" if place < 0.3 else "r" for place in places) == "rerrarrrrrrrrreerrrr"
