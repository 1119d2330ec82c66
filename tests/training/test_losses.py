"""The losses against plain arithmetic, instance by instance."""

import math

import pytest
import torch

from cappy.training.losses import LISTWISE_TEMPERATURE, group_mean, instance_losses

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.0])
LABELS = torch.tensor([0.5, 0.0, 1.0, 0.25, 0.75])
GROUPS = torch.tensor([0, 0, 1, 1, 1])


def losses(head: str, relative: float = 0.0, listwise: float = 0.0, logits: torch.Tensor = LOGITS) -> list[float]:
    values: list[float] = instance_losses(
        logits, LABELS, GROUPS, 2, head=head, relative=relative, listwise=listwise
    ).tolist()
    return values


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


def test_group_mean_gives_each_group_its_own() -> None:
    assert group_mean(LABELS, GROUPS, 2).tolist() == pytest.approx([0.25, 2 / 3])
