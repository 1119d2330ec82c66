"""What runs on the devices: passes forwards and backwards, and the optimizer's step, compiled once per shape.

A pass's rows lie on the devices in equal parts. Every device holds all parameters and the whole optimizer; a gradient
is summed over all of them, so no result depends on the devices' number, but for the order in which floats are added.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cappy.training.settings import TrainingSettings
from cappy.training.tpu.encoder import Architecture, Params, forward
from cappy.training.tpu.weights import Arrays, decayed, stack, unstack

_AXIS = "rows"
Pullback = Callable[[Array], tuple[Params]]
"""From the gradient of logits to that of the parameters; it holds what the pass computed, on the devices."""


class Tokens(NamedTuple):
    """Right-padded pairs: ids and types (rows, length), and how many tokens of each row count (rows,), at least 1."""

    ids: Any
    types: Any
    lengths: Any


class Engine:
    """Parameters, gradients and optimizer on the devices, and the programs that move them."""

    def __init__(self, tensors: Arrays, arch: Architecture, plan: TrainingSettings, devices: Sequence[jax.Device]):
        mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
        whole = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        self._whole = whole
        self._shared = NamedSharding(mesh, PartitionSpec(_AXIS))  # type: ignore[no-untyped-call]
        self._arch, self._clip = arch, plan.clip
        stacked = stack(tensors)
        self._optimizer = optax.chain(
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.add_decayed_weights(plan.weight_decay, mask=decayed(stacked, arch)),
        )
        self.params: Params = jax.device_put(stacked, whole)
        self._state: Any = jax.device_put(self._optimizer.init(self.params), whole)
        self._zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=whole)
        self.sums: Params = self._zeros(self.params)
        self._logits = jax.jit(self._passed, out_shardings=whole)
        self._pass = jax.jit(self._pulled_later)
        self._pull = jax.jit(_added, donate_argnums=0, out_shardings=whole)
        self._norm = jax.jit(optax.tree.norm, out_shardings=whole)
        self._apply = jax.jit(self._moved, donate_argnums=(0, 1), out_shardings=whole)

    def logits(self, tokens: Tokens) -> Array:
        """Logits (rows,) without dropout."""
        found: Array = self._logits(self.params, self.placed(tokens))
        return found

    def passed(self, tokens: Tokens, *, seed: int, first: int) -> tuple[Array, Pullback]:
        """Logits (rows,) with dropout, and the way back; `seed` (32 bits) and a row's number decide its dropout.

        The numbers count from `first`.
        """
        found: tuple[Array, Pullback] = self._pass(self.params, self.placed(tokens), np.uint32(seed), np.uint32(first))
        return found

    def pull(self, pullback: Pullback, gradient: Any) -> None:
        """Adds the parameters' gradients, given that of a pass's logits, (rows,); returns before they are computed."""
        self.sums = self._pull(self.sums, pullback, jax.device_put(gradient, self._shared))

    def placed(self, tokens: Tokens) -> Tokens:
        """The tokens on the devices, an equal part of the rows on each."""
        found: Tokens = jax.device_put(tokens, self._shared)
        return found

    def forget(self) -> None:
        """Drops the gradients."""
        self.sums = self._zeros(self.params)

    def step(self, rate: float) -> float:
        """One step of AdamW; the gradient's norm before clipping. No step where that is no number."""
        norm = float(self._norm(self.sums))
        if norm < float("inf"):
            share = np.float32(min(1.0, (self._clip or math.inf) / (norm + 1e-6)))
            self.params, self._state = self._apply(self.params, self._state, self.sums, share, np.float32(rate))
        return norm

    def weights(self) -> Arrays:
        """The parameters under the scorer folder's names, on the host."""
        return unstack(self.params)

    def gradients(self) -> Arrays:
        """The gradients that wait for a step, as `weights`."""
        return unstack(self.sums)

    def moments(self) -> tuple[int, Arrays, Arrays]:
        """AdamW's state: its steps, and the two moments, as `weights`."""
        adam = self._state[0]
        return int(adam.count), unstack(adam.mu), unstack(adam.nu)

    def restore(self, weights: Arrays, moments: tuple[int, Arrays, Arrays] | None) -> None:
        """Takes parameters and AdamW's state from the host; without moments AdamW begins anew."""
        self.params = jax.device_put(stack(weights), self._whole)
        state = self._optimizer.init(self.params)
        if moments is not None:
            count, first, second = moments
            adam = state[0]._replace(count=np.int32(count), mu=stack(first), nu=stack(second))
            state = (adam, *state[1:])
        self._state = jax.device_put(state, self._whole)

    def _passed(self, params: Params, tokens: Tokens, keys: Array | None = None) -> Array:
        return forward(params, self._arch, tokens.ids, tokens.types, tokens.lengths, keys=keys)

    def _pulled_later(self, params: Params, tokens: Tokens, seed: Array, first: Array) -> tuple[Array, Any]:
        numbers = first + jnp.arange(len(tokens.lengths), dtype=jnp.uint32)
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)
        return jax.vjp(lambda params: self._passed(params, tokens, keys), params)

    def _moved(self, params: Params, state: Any, sums: Params, share: Array, rate: Array) -> tuple[Params, Any]:
        clipped = jax.tree.map(lambda gradient: gradient * share, sums)
        moves, state = self._optimizer.update(clipped, state, params)
        return jax.tree.map(lambda param, move: param - rate * move, params, moves), state


def _added(sums: Params, pullback: Pullback, gradient: Array) -> Params:
    (found,) = pullback(gradient)
    added: Params = jax.tree.map(jnp.add, sums, found)
    return added
