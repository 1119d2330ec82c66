"""Losses over whole instances: a scorer ranks the responses of one instance, so the losses compare within instances.

A loss that compares responses is a function and a field of `LossSettings`; the field defines its flag, its validation,
its help text and its weight in the sum. Importing this module does not import torch.

Shapes: (pairs,) is one value per (instruction, response) pair of a forward pass, (count,) one per instance; `groups`,
(pairs,), maps each pair to its instance, 0 to count - 1.
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
"""Temperature of the softmax over labels (0 to 1) and over scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs of a forward pass: logits, labels (0 to 1) and instance indices (`groups`), all (pairs,).

    `compared`, (pairs,) bool, marks the pairs that the comparing losses use; None means all. `weights`, (pairs,), are
    the weights of the pairs in the head's loss; None means equal weights.
    """

    logits: "Tensor"
    labels: "Tensor"
    groups: "Tensor"
    count: int
    compared: "Tensor | None" = None
    weights: "Tensor | None" = None


@dataclass(frozen=True, slots=True)
class ComparingLoss:
    """Attaches the loss function `compute` to a field of `LossSettings`.

    `compute(scores, labels, groups, count)` takes (pairs,) tensors and returns one loss per instance, (count,).
    """

    compute: "Callable[[Tensor, Tensor, Tensor, int], Tensor]"


def relative_loss(scores: "Tensor", labels: "Tensor", groups: "Tensor", count: int) -> "Tensor":
    """Mean squared error per instance, (count,), of scores and labels, each relative to its mean in the instance."""
    difference = scores - labels
    deviation = difference - group_mean(difference, groups, count)[groups]
    return group_mean(deviation**2, groups, count)


def listwise_loss(scores: "Tensor", labels: "Tensor", groups: "Tensor", count: int) -> "Tensor":
    """Cross-entropy per instance, (count,), between the softmax of the labels and that of the scores.

    This is ListNet with top-one probabilities (Cao et al. 2007).
    """
    target = _log_softmax(labels / LISTWISE_TEMPERATURE, groups, count).exp()
    cross_entropy = -target * _log_softmax(scores / LISTWISE_TEMPERATURE, groups, count)
    return scores.new_zeros(count).index_add(0, groups, cross_entropy)


@settings
class LossSettings:
    """The weights of the losses that compare the responses of an instance; the head's loss has weight 1."""

    relative: Annotated[
        float,
        ComparingLoss(relative_loss),
        ADVANCED,
        Field(
            ge=0,
            description="Weight of the relative loss (deviations from the mean of an instance's selectable responses)",
        ),
    ] = 0.0
    listwise: Annotated[
        float,
        ComparingLoss(listwise_loss),
        ADVANCED,
        Field(ge=0, description="Weight of the listwise loss (softmax over an instance's selectable responses)"),
    ] = 1.0


COMPARING_LOSSES: Mapping[str, ComparingLoss] = {
    name: comparing_loss
    for name, hint in get_type_hints(LossSettings, include_extras=True).items()
    for comparing_loss in hint.__metadata__
    if isinstance(comparing_loss, ComparingLoss)
}
"""The comparing losses by the name of their setting."""


def instance_losses(pairs: Pairs, head: str, config: LossSettings) -> "Tensor":
    """One loss per instance, (count,): the head's loss over all its pairs plus the comparing losses, weighted.

    The head's loss is the squared error (`mse`) or the cross-entropy with soft labels (`bce`), a weighted mean over the
    instance's pairs.
    """
    groups, count = pairs.groups, pairs.count
    pointwise = _pointwise(pairs, head)
    if pairs.weights is not None:
        mean_weights = group_mean(pairs.weights, groups, count).clamp(min=1e-12)
        pointwise = pointwise * pairs.weights / mean_weights[groups]
    loss = group_mean(pointwise, groups, count)
    scores, labels = pairs.logits.sigmoid() if head == "bce" else pairs.logits, pairs.labels
    if pairs.compared is not None:
        scores, labels, groups = scores[pairs.compared], labels[pairs.compared], groups[pairs.compared]
    for name, comparing_loss in COMPARING_LOSSES.items():
        if weight := getattr(config, name):
            loss = loss + weight * comparing_loss.compute(scores, labels, groups, count)
    return loss


def group_mean(values: "Tensor", groups: "Tensor", count: int) -> "Tensor":
    """The mean per group, (count,), of values (pairs,); 0 for an empty group."""
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
    sums = values.new_zeros(count).index_add(0, groups, shifted.exp())
    return shifted - sums.log()[groups]
