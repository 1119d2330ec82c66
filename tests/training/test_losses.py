"""The losses against plain arithmetic, instance by instance."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from cappy.training.feed import comparison_mask
from cappy.training.losses import (
    COMPARING_LOSSES,
    LISTWISE_TEMPERATURE,
    LossSettings,
    Pairs,
    group_mean,
    instance_losses,
)

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.0])
LABELS = torch.tensor([0.5, 0.0, 1.0, 0.25, 0.75])
GROUPS = torch.tensor([0, 0, 1, 1, 1])
ALL = torch.ones(5, dtype=torch.bool)


def losses(
    head: str,
    relative: float = 0.0,
    listwise: float = 0.0,
    logits: torch.Tensor = LOGITS,
    compared: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> list[float]:
    pairs = Pairs(logits=logits, labels=LABELS, groups=GROUPS, count=2, compared=compared, weights=weights)
    values: list[float] = instance_losses(pairs, head, LossSettings(relative=relative, listwise=listwise)).tolist()
    return values


def alone(chosen: list[int], head: str, relative: float = 0.0, listwise: float = 0.0) -> float:
    """The loss of these pairs as an instance of their own."""
    pairs = Pairs(
        logits=LOGITS[chosen], labels=LABELS[chosen], groups=torch.zeros(len(chosen), dtype=torch.long), count=1
    )
    return instance_losses(pairs, head, LossSettings(relative=relative, listwise=listwise)).item()


def test_pointwise_losses_are_means_over_the_instance() -> None:
    assert losses("mse")[0] == pytest.approx(((0.3 - 0.5) ** 2 + 1.0) / 2)
    p = [1 / (1 + math.exp(-x)) for x in (0.3, -1.0)]
    bce = -(0.5 * math.log(p[0]) + 0.5 * math.log(1 - p[0]) + math.log(1 - p[1])) / 2
    assert losses("bce")[0] == pytest.approx(bce, abs=1e-6)


def test_the_relative_loss_sees_deviations_from_the_mean_alone() -> None:
    only = [both - point for both, point in zip(losses("mse", relative=4.0), losses("mse"), strict=True)]
    shifted = LOGITS + torch.tensor([5.0, 5.0, -3.0, -3.0, -3.0])
    moved = [
        both - point
        for both, point in zip(losses("mse", 4.0, logits=shifted), losses("mse", logits=shifted), strict=True)
    ]
    assert moved == pytest.approx(only, abs=1e-4)
    assert only[0] == pytest.approx(4 * (((0.65 - 0.25) ** 2 + (-0.65 + 0.25) ** 2) / 2), abs=1e-5)


def test_the_listwise_loss_is_a_cross_entropy_of_softmaxes() -> None:
    only = losses("mse", listwise=1.0)[1] - losses("mse")[1]
    scores, labels = LOGITS[2:] / LISTWISE_TEMPERATURE, LABELS[2:] / LISTWISE_TEMPERATURE
    expected = -(labels.softmax(0) * scores.log_softmax(0)).sum().item()
    assert only == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["relative", "listwise"])
def test_comparisons_are_among_the_pairs_compared_and_the_pointwise_loss_is_over_all(kind: str) -> None:
    compared = torch.tensor([True, True, True, False, True])
    left_out = LOGITS + torch.tensor([0.0, 0.0, 0.0, 7.0, 0.0])
    weights: dict[str, Any] = {kind: 2.0}

    def comparison(logits: torch.Tensor, compared: torch.Tensor) -> float:
        return losses("mse", logits=logits, compared=compared, **weights)[1] - losses("mse", logits=logits)[1]

    assert comparison(left_out, compared) == pytest.approx(comparison(LOGITS, compared), abs=1e-4)
    assert comparison(left_out, ALL) != pytest.approx(comparison(LOGITS, ALL), abs=1e-2)
    only = alone([2, 4], "mse", **weights) - alone([2, 4], "mse")
    assert comparison(LOGITS, compared) == pytest.approx(only, abs=1e-5)


def test_what_a_selector_may_not_pick_is_compared_only_where_there_is_nothing_else() -> None:
    assert comparison_mask([0, 2, 3], [2, 3, 5]) == [False, True, True]
    assert comparison_mask([0, 1, 2], [2]) == [True, True, True]
    assert comparison_mask([0, 1], []) == [True, True]


def test_group_mean_gives_each_group_its_own() -> None:
    assert group_mean(LABELS, GROUPS, 2).tolist() == pytest.approx([0.25, 2 / 3])


@pytest.mark.parametrize("head", ["mse", "bce"])
def test_weights_make_the_pointwise_loss_a_weighted_mean_and_leave_comparisons_alone(head: str) -> None:
    weights = torch.tensor([1.0, 0.25, 1.0, 0.0, 1.0])

    def weighed(relative: float, weights: torch.Tensor | None) -> torch.Tensor:
        return torch.tensor(losses(head, relative, weights=weights))

    each = [alone([i], head) for i in range(5)]
    expected = [(each[0] + 0.25 * each[1]) / 1.25, (each[2] + each[4]) / 2]
    assert weighed(0.0, weights).tolist() == pytest.approx(expected, abs=1e-6)
    assert weighed(0.0, torch.full((5,), 3.0)).tolist() == pytest.approx(weighed(0.0, None).tolist(), abs=1e-6)
    with_comparison = weighed(2.0, weights) - weighed(0.0, weights)
    assert with_comparison.tolist() == pytest.approx((weighed(2.0, None) - weighed(0.0, None)).tolist(), abs=1e-6)
    assert weighed(0.0, torch.zeros(5)).tolist() == [0.0, 0.0]


def test_every_comparison_is_a_setting_that_refuses_what_is_below_zero() -> None:
    assert {field.name for field in dataclasses.fields(LossSettings)} == set(COMPARING_LOSSES)
    for name in COMPARING_LOSSES:
        with pytest.raises(ValueError, match=name):
            LossSettings(**{name: -0.1})
