"""Losses over whole instances: the decision is inside the group, and so is what is learned."""

import torch
from torch import Tensor
from torch.nn import functional

LISTWISE_TEMPERATURE = 0.1


def group_mean(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean of (pairs,) values in each of `count` groups, as (count,)."""
    sums = values.new_zeros(count).index_add(0, groups, values)
    sizes = values.new_zeros(count).index_add(0, groups, torch.ones_like(values))
    return sums / sizes.clamp(min=1)


def instance_losses(
    logits: Tensor,
    labels: Tensor,
    groups: Tensor,
    count: int,
    *,
    compared: Tensor,
    weights: Tensor | None = None,
    head: str,
    relative: float,
    listwise: float,
) -> Tensor:
    """One loss per instance, (count,), from (pairs,) logits, labels and group numbers.

    The pointwise loss of the head (squared error, or cross-entropy with soft labels) over all pairs, a mean by
    `weights` (pairs,) where given; plus `relative` times the squared error of the scores' deviations from their
    instance's mean, plus `listwise` times the cross-entropy of a softmax over the instance's scores with one over its
    labels. These two are over the pairs that are `compared`, (pairs,) bool.
    """
    scores = logits.sigmoid() if head == "bce" else logits
    if head == "bce":
        pointwise = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    else:
        pointwise = (scores - labels) ** 2
    if weights is not None:
        pointwise = pointwise * weights / group_mean(weights, groups, count).clamp(min=1e-12)[groups]
    loss = group_mean(pointwise, groups, count)
    scores, labels, groups = scores[compared], labels[compared], groups[compared]
    if relative:
        difference = scores - labels
        deviation = difference - group_mean(difference, groups, count)[groups]
        loss = loss + relative * group_mean(deviation**2, groups, count)
    if listwise:
        target = _log_softmax(labels / LISTWISE_TEMPERATURE, groups, count).exp()
        entropy = -target * _log_softmax(scores / LISTWISE_TEMPERATURE, groups, count)
        loss = loss + listwise * loss.new_zeros(count).index_add(0, groups, entropy)
    return loss


def _log_softmax(values: Tensor, groups: Tensor, count: int) -> Tensor:
    highest = values.new_full((count,), -torch.inf).scatter_reduce(0, groups, values.detach(), "amax")
    shifted = values - highest[groups]
    total = values.new_zeros(count).index_add(0, groups, shifted.exp())
    return shifted - total.log()[groups]
