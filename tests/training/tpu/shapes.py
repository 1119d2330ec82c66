"""Batches of few shapes: every pair once, whole instances together, within the budget."""

import random

import numpy as np
import pytest

from cappy.scoring.encoding import Encoded
from cappy.training.feed import Group
from cappy.training.tpu.batches import Shapes, score_batches, update_batches

PAD = 0


def encoded_groups(seed: int, count: int, longest: int) -> tuple[list[Group], list[list[Encoded]]]:
    """Groups of 1 to 6 responses, whose pairs hold their own number as every token id."""
    rng = random.Random(seed)
    groups, encoded, number = [], [], 0
    for _ in range(count):
        size = rng.randint(1, 6)
        numbers = range(number + 1, number + size + 1)
        number += size
        groups.append(Group("i", tuple(map(str, numbers)), tuple(n / 1000 for n in numbers), (True,) * size))
        lengths = [rng.randint(3, longest) for _ in numbers]
        encoded.append([Encoded(ids=(n,) * k, types=(0,) * k) for n, k in zip(numbers, lengths, strict=True)])
    return groups, encoded


def shapes(**values: int) -> Shapes:
    return Shapes(**{"max_length": 200, "tokens": 512, "largest": 6, "most": 60, "devices": 1, **values})


def test_lengths_double_up_to_the_scorers_own() -> None:
    assert shapes().lengths == (32, 64, 128, 200)
    assert shapes(max_length=512).lengths == (32, 64, 128, 256, 512)
    assert shapes(max_length=32).lengths == (32,)
    assert shapes(max_length=20).lengths == (20,)
    assert [shapes().length_of(tokens) for tokens in (1, 32, 33, 200)] == [32, 32, 64, 200]


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("tokens", [64, 512, 8192])
def test_an_updates_batches_hold_every_pair_once_in_a_shape_of_the_list(devices: int, tokens: int) -> None:
    allowed = shapes(tokens=tokens * devices, devices=devices)
    for seed in range(20):
        groups, encoded = encoded_groups(seed, 10, longest=random.Random(seed).choice([20, 60, 200]))
        seen: dict[int, float] = {}
        numbers: list[int] = []
        for batch in update_batches(groups, encoded, allowed, pad=PAD, most_groups=10):
            rows, length = batch.tokens.ids.shape
            assert (rows, length) in allowed.all
            assert rows % devices == 0
            real = batch.groups < 10
            assert not batch.tokens.ids[~real].any()
            assert (batch.tokens.lengths[~real] == 1).all()
            for group in set(batch.groups[real]):
                own = batch.tokens.ids[batch.groups == group, 0]
                assert tuple(map(str, own)) in {g.responses for g in groups}, "instances stay whole"
            seen |= dict(zip(batch.tokens.ids[real, 0].tolist(), batch.labels[real].tolist(), strict=True))
            numbers += batch.numbers[real].tolist()
        pairs = sum(len(group.responses) for group in groups)
        assert seen == {number: pytest.approx(number / 1000) for number in range(1, pairs + 1)}
        assert sorted(numbers) == list(range(pairs))


def test_a_pairs_number_does_not_depend_on_the_batches() -> None:
    groups, encoded = encoded_groups(1, 10, longest=200)
    by_budget = []
    for tokens in (64, 100_000):
        batches = update_batches(groups, encoded, shapes(tokens=tokens), pad=PAD, most_groups=10)
        by_budget.append(
            {
                int(ids[0]): int(number)
                for batch in batches
                for ids, number, group in zip(batch.tokens.ids, batch.numbers, batch.groups, strict=True)
                if group < 10
            }
        )
    assert by_budget[0] == by_budget[1]


def test_full_batches_keep_to_the_budget_unless_one_instance_is_larger() -> None:
    for length in shapes().lengths:
        assert shapes().full(length) * length <= max(512, 6 * length)
    assert shapes(tokens=100_000).full(32) == 60, "no larger than an update"


def test_scored_pairs_come_once_and_in_shapes_of_the_list() -> None:
    _, encoded = encoded_groups(3, 40, longest=200)
    pairs = [pair for group in encoded for pair in group]
    seen: list[int] = []
    for chosen, tokens in score_batches(pairs, shapes(devices=8), pad=PAD):
        assert tokens.ids.shape in shapes(devices=8).all
        for row, index in enumerate(chosen):
            size = len(pairs[index].ids)
            assert tokens.lengths[row] == size
            assert np.array_equal(tokens.ids[row, :size], pairs[index].ids)
            assert not tokens.ids[row, size:].any()
        seen += chosen
    assert sorted(seen) == list(range(len(pairs)))


def test_there_are_at_most_two_shapes_per_length() -> None:
    for devices in (1, 8):
        for tokens in (64, 2048, 65_536):
            allowed = shapes(tokens=tokens * devices, devices=devices, max_length=512)
            assert len(allowed.all) <= 2 * 5
