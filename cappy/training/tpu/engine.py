"""What runs on the devices: one update, and scores, compiled once per shape; rows are shared out, parameters are not.

A batch's rows lie on the devices in equal parts. Every device holds all parameters and the whole optimizer. An
instance's rows may lie on several devices; its sums are taken over all of them, so no result depends on the devices'
number, but for the order in which floats are added.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from cappy.training.plan import TrainingSettings
from cappy.training.tpu.batches import Rows, Tokens
from cappy.training.tpu.encoder import Architecture, Params, forward
from cappy.training.tpu.losses import instance_losses
from cappy.training.tpu.weights import Tensors, decayed, unstack

_AXIS = "rows"


class Engine:
    """Parameters and optimizer on the devices, and the programs that move them.

    `compiled` counts the programs by name: `accumulate` and `score` have one per shape, `apply` has one.
    """

    def __init__(
        self,
        tensors: Tensors,
        arch: Architecture,
        plan: TrainingSettings,
        *,
        head: str,
        devices: Sequence[jax.Device],
        dtype: Any = jnp.float32,
    ) -> None:
        mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
        self._whole = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        self._shared = NamedSharding(mesh, PartitionSpec(_AXIS))  # type: ignore[no-untyped-call]
        self._arch, self._plan, self._head, self._dtype = arch, plan, head, dtype
        self._has_types = tensors[f"{arch.kind}.embeddings.token_type_embeddings.weight"].shape[0] > 1
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(plan.clip),
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.add_decayed_weights(plan.weight_decay, mask=decayed(tensors, arch)),
        )
        self.compiled: Counter[str] = Counter()
        self.params: Params = jax.device_put(tensors, self._whole)
        self.moments: Any = jax.device_put(self._optimizer.init(self.params), self._whole)
        self._sums = jax.tree.map(jnp.zeros_like, self.params)
        self._accumulate = jax.jit(self._add_gradients, donate_argnums=1, out_shardings=self._whole)
        self._apply = jax.jit(self._step, donate_argnums=(0, 1, 2), out_shardings=self._whole)
        self._score = jax.jit(self._activated, out_shardings=self._whole)

    def update(self, batches: Iterable[Rows], *, instances: int, rate: float, seed: int) -> Array:
        """One step of the optimizer over the batches of `instances` whole instances; their mean loss, a scalar.

        Returns before the devices are done. `seed` (32 bits) decides the dropout.
        """
        total = self.accumulate(batches, instances=instances, seed=seed)
        self.params, self.moments, self._sums = self._apply(self.params, self.moments, self._sums, np.float32(rate))
        return total

    def accumulate(self, batches: Iterable[Rows], *, instances: int, seed: int) -> Array:
        """Adds the gradients of the mean loss over `instances` to those that wait for a step; that loss, a scalar."""
        total: Array = jnp.float32(0)
        for batch in batches:
            rows = self.place(batch)
            loss, self._sums = self._accumulate(
                self.params, self._sums, rows, np.uint32(seed), np.float32(1 / instances)
            )
            total = total + loss
        return total

    def place(self, batch: Rows) -> Rows:
        """The batch on the devices, an equal part of its rows on each."""
        placed: Rows = jax.device_put(batch, self._shared)
        return placed

    def scores(self, tokens: Tokens) -> NDArray[np.float32]:
        """Scores (rows,) as the head gives them, without dropout; padding rows have one too."""
        return np.asarray(self._score(self.params, jax.device_put(tokens, self._shared)))

    def weights(self) -> Tensors:
        """The parameters under the scorer folder's names, on the host."""
        return unstack(self.params)

    def gradients(self) -> Tensors:
        """The gradients that wait for a step, as `weights`."""
        return unstack(self._sums)

    def restore(self, tensors: Tensors, moments: Any) -> None:
        """Takes stacked parameters and the optimizer's state from the host."""
        self.params = jax.device_put(tensors, self._whole)
        self.moments = jax.device_put(moments, self._whole)

    def _logits(self, params: Params, tokens: Tokens, keys: Array | None) -> Array:
        types = tokens.types if self._has_types else jnp.zeros_like(tokens.types)
        return forward(params, self._arch, tokens.ids, types, tokens.lengths, keys=keys, dtype=self._dtype)

    def _add_gradients(self, params: Params, sums: Params, rows: Rows, seed: Array, scale: Array) -> Any:
        self.compiled["accumulate"] += 1

        def loss(params: Params) -> Array:
            key = jax.random.key(seed)
            keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(rows.numbers)
            logits = self._logits(params, rows.tokens, keys)
            plan, count = self._plan, self._plan.batch_instances
            losses = instance_losses(
                logits,
                rows.labels,
                rows.groups,
                count + 1,
                head=self._head,
                relative=plan.relative,
                listwise=plan.listwise,
            )
            return losses[:count].sum() * scale

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(jnp.add, sums, gradients)

    def _step(self, params: Params, moments: Any, sums: Params, rate: Array) -> Any:
        self.compiled["apply"] += 1
        updates, moments = self._optimizer.update(sums, moments, params)
        moved = jax.tree.map(lambda param, update: param - rate * update, params, updates)
        return moved, moments, jax.tree.map(jnp.zeros_like, sums)

    def _activated(self, params: Params, tokens: Tokens) -> Array:
        self.compiled["score"] += 1
        logits = self._logits(params, tokens, None)
        return jax.nn.sigmoid(logits) if self._head == "bce" else logits
