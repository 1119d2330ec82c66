"""The losses of `cappy.training.losses`, in JAX; a sum over an instance crosses devices where its rows do."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from cappy.training.losses import LISTWISE_TEMPERATURE


def group_mean(values: Array, groups: Array, count: int) -> Array:
    """Mean of (pairs,) values in each of `count` groups, as (count,); 0 in a group without pairs."""
    return _sum(values, groups, count) / jnp.maximum(_sum(jnp.ones_like(values), groups, count), 1.0)


def instance_losses(
    logits: Array, labels: Array, groups: Array, count: int, *, head: str, relative: float, listwise: float
) -> Array:
    """One loss per instance, (count,), from (pairs,) logits, labels and group numbers; the same as torch's.

    A group without pairs has the loss 0, with a gradient of 0.
    """
    scores = jax.nn.sigmoid(logits) if head == "bce" else logits
    # Not with maximum and abs: their gradients in JAX do not add up at a logit of exactly 0.
    pointwise = jax.nn.softplus(logits) - logits * labels if head == "bce" else (scores - labels) ** 2
    loss = group_mean(pointwise, groups, count)
    if relative:
        difference = scores - labels
        deviation = difference - group_mean(difference, groups, count)[groups]
        loss = loss + relative * group_mean(deviation**2, groups, count)
    if listwise:
        target = jnp.exp(_log_softmax(labels / LISTWISE_TEMPERATURE, groups, count))
        entropy = -target * _log_softmax(scores / LISTWISE_TEMPERATURE, groups, count)
        loss = loss + listwise * _sum(entropy, groups, count)
    return loss


def _sum(values: Array, groups: Array, count: int) -> Array:
    return jax.ops.segment_sum(values, groups, count)


def _log_softmax(values: Array, groups: Array, count: int) -> Array:
    highest = jax.ops.segment_max(lax.stop_gradient(values), groups, count)
    shifted = values - highest[groups]
    total = _sum(jnp.exp(shifted), groups, count)
    # A group without pairs has a total of 0, whose logarithm would make its neighbours' gradients NaN.
    return shifted - jnp.log(jnp.where(total > 0, total, 1.0))[groups]
