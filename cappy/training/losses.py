"""Losses over whole instances: the decision is inside the group, and so is what is learned.

A loss that compares the responses of an instance is a function and a field of `LossSettings`; its flag, the check of
its value, what `--help` says and the sum of losses follow from the field. Importing this module is light.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, get_type_hints

from pydantic import Field

from cappy.config import ADVANCED, settings

if TYPE_CHECKING:
    from torch import Tensor

LISTWISE_TEMPERATURE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs of a pass: logits and labels, (pairs,), and the number of each pair's instance, below `count`.

    `compared`, (pairs,) bool, are those that the comparisons see, all of them if left out. `weights`, (pairs,), are
    those of the head's loss, equal if left out.
    """

    logits: "Tensor"
    labels: "Tensor"
    groups: "Tensor"
    count: int
    compared: "Tensor | None" = None
    weights: "Tensor | None" = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Marks the field of `LossSettings` whose loss `compute` is.

    It makes one loss per instance, (count,), of (pairs,) scores, labels and group numbers, and the count.
    """

    compute: "Callable[[Tensor, Tensor, Tensor, int], Tensor]"


def relative_loss(scores: "Tensor", labels: "Tensor", groups: "Tensor", count: int) -> "Tensor":
    """The squared error of the scores' deviations from their instance's mean."""
    difference = scores - labels
    deviation = difference - group_mean(difference, groups, count)[groups]
    return group_mean(deviation**2, groups, count)


def listwise_loss(scores: "Tensor", labels: "Tensor", groups: "Tensor", count: int) -> "Tensor":
    """The cross-entropy of a softmax over the instance's scores with one over its labels."""
    target = _log_softmax(labels / LISTWISE_TEMPERATURE, groups, count).exp()
    entropy = -target * _log_softmax(scores / LISTWISE_TEMPERATURE, groups, count)
    return scores.new_zeros(count).index_add(0, groups, entropy)


@settings
class LossSettings:
    """The weight of each loss that compares the responses of an instance, beside the head's loss."""

    relative: Annotated[
        float,
        Comparison(relative_loss),
        ADVANCED,
        Field(
            ge=0,
            description="Weight of the relative loss (deviations from the mean of an instance's selectable responses)",
        ),
    ] = 0.0
    listwise: Annotated[
        float,
        Comparison(listwise_loss),
        ADVANCED,
        Field(ge=0, description="Weight of the listwise loss (softmax over an instance's selectable responses)"),
    ] = 1.0


COMPARISONS: Mapping[str, Comparison] = {
    name: mark
    for name, hint in get_type_hints(LossSettings, include_extras=True).items()
    for mark in hint.__metadata__
    if isinstance(mark, Comparison)
}
"""The losses that compare, by the name of their setting."""


def instance_losses(pairs: Pairs, head: str, config: LossSettings) -> "Tensor":
    """One loss per instance, (count,): the head's over all its pairs, plus each comparison by its weight in `config`.

    The head's loss is the squared error (`mse`), or the cross-entropy with soft labels (`bce`), a mean over the pairs
    by their weights.
    """
    groups, count = pairs.groups, pairs.count
    pointwise = _pointwise(pairs, head)
    if pairs.weights is not None:
        shares = group_mean(pairs.weights, groups, count).clamp(min=1e-12)
        pointwise = pointwise * pairs.weights / shares[groups]
    loss = group_mean(pointwise, groups, count)
    scores, labels = pairs.logits.sigmoid() if head == "bce" else pairs.logits, pairs.labels
    if pairs.compared is not None:
        scores, labels, groups = scores[pairs.compared], labels[pairs.compared], groups[pairs.compared]
    for name, comparison in COMPARISONS.items():
        if weight := getattr(config, name):
            loss = loss + weight * comparison.compute(scores, labels, groups, count)
    return loss


def group_mean(values: "Tensor", groups: "Tensor", count: int) -> "Tensor":
    """Mean of (pairs,) values in each of `count` groups, as (count,)."""
    sums = values.new_zeros(count).index_add(0, groups, values)
    sizes = values.new_zeros(count).index_add(0, groups, values.new_ones(values.shape))
    return sums / sizes.clamp(min=1)


def _pointwise(pairs: Pairs, head: str) -> "Tensor":
    if head == "bce":
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(pairs.logits, pairs.labels, reduction="none")
    return (pairs.logits - pairs.labels) ** 2


def _log_softmax(values: "Tensor", groups: "Tensor", count: int) -> "Tensor":
    highest = values.new_full((count,), -math.inf).scatter_reduce(0, groups, values.detach(), "amax")
    shifted = values - highest[groups]
    total = values.new_zeros(count).index_add(0, groups, shifted.exp())
    return shifted - total.log()[groups]
