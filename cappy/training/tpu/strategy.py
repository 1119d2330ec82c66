"""The strategy `jax`: the encoder's passes and AdamW run in JAX on every device of this machine, the rest in torch.

What stands in the scorer for its model hands tokens to the devices and takes logits back. The losses are torch's, on
the host; their gradient goes back the same way. So feed, losses, checks and checkpoints are those of the one loop.

A pass's rows lie on the devices in equal parts. Every device holds all parameters and the whole optimizer; a gradient
is summed over all of them, so no result depends on the devices' number, but for the order in which floats are added.
XLA compiles one program per shape, so every pass is cut and padded to one of a few.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import torch
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from cappy.errors import ConfigError
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import Tensors
from cappy.training.distributed import MOMENTS
from cappy.training.settings import TrainingSettings
from cappy.training.tpu.encoder import (
    Architecture,
    Arrays,
    Params,
    parse_architecture,
    decay_mask,
    forward,
    from_torch,
    stack,
    to_torch,
    unstack,
)

STEP_KEY = "step"
MIN_LENGTH = 32
"""Tokens of the shortest shape; lengths double from there up to the scorer's own."""
ROW_DIVISORS = (1, 2, 4)
"""The row counts of a length: full, half and a quarter."""
_AXIS = "rows"
Pullback = Callable[[Array], tuple[Params]]
"""From the gradient of logits to that of the parameters; it holds what the pass computed, on the devices."""


class Tokens(NamedTuple):
    """Right-padded pairs: ids and types (rows, length), and how many tokens of each row count (rows,), at least 1."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    lengths: NDArray[np.int32]


class _TracedTokens(Protocol):
    """`Tokens` in a function that JAX compiles, where its own arrays stand in their place."""

    @property
    def ids(self) -> Array: ...

    @property
    def types(self) -> Array: ...

    @property
    def lengths(self) -> Array: ...


class JaxStrategy:
    """JAX's engine behind the methods of `Replicas`; the scorer's model is `JaxModel` until training has ended."""

    lockstep = False

    def __init__(self, scorer: Scorer, config: TrainingSettings) -> None:
        self._model = scorer.model
        arch = _scorer_architecture(scorer)
        self.engine = Engine(from_torch(self._model.state_dict()), arch, config, find_devices(config.devices))
        shapes = Shapes(longest=scorer.encoder.max_length, tokens=config.batch_tokens, devices=config.devices)
        scorer.model = JaxModel(self.engine, shapes, self._model.config)

    def forget(self) -> None:
        """Drops the gradients."""
        self.engine.forget()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As `Replicas.backward`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        """As `Replicas.step`."""
        return self.engine.step(rate)

    def weights(self) -> Tensors:
        """A copy of the weights, on the CPU."""
        return to_torch(self.engine.weights())

    def moments(self) -> Tensors:
        """A copy of the optimizer's state, by parameter and moment."""
        steps, *moments = self.engine.moments()
        named = {f"{name}.{STEP_KEY}": torch.tensor(float(steps)) for name in moments[0]}
        for key, arrays in zip(MOMENTS, moments, strict=True):
            named |= {f"{name}.{key}": tensor for name, tensor in to_torch(arrays).items()}
        return named

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Puts a checkpoint's tensors in place."""
        named = [from_torch({name: moments[f"{name}.{key}"] for name in weights}) for key in MOMENTS if moments]
        steps = {int(tensor) for name, tensor in moments.items() if name.endswith(f".{STEP_KEY}")}
        self.engine.restore(from_torch(weights), (steps.pop(), named[0], named[1]) if moments else None)

    def best_model(self, best: Tensors) -> nn.Module:
        """The model that the scorer had, with the best weights."""
        self._model.load_state_dict(best)
        model: nn.Module = self._model
        return model


class JaxModel(nn.Module):
    """Called as the model is: pads to the engine's shapes, runs there, and lets torch's `backward` find its way."""

    def __init__(self, engine: "Engine", shapes: "Shapes", config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self._engine, self._shapes = engine, shapes
        self._way_back = nn.Parameter(torch.zeros(()))
        self.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits (pairs, 1), on the CPU."""
        lengths = attention_mask.sum(dim=1)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = Tokens(*(tensor.cpu().numpy().astype(np.int32) for tensor in (input_ids, types, lengths)))
        if self.training:
            seed = int(torch.randint(2**31, ()))
            logits: Tensor = _DevicePass.apply(self._way_back, self, rows, seed)  # type: ignore[no-untyped-call]
        else:
            scored = [self._score(rows, own, count) for own, count in self._split(rows)]
            logits = torch.from_numpy(np.concatenate(scored))
        return SequenceClassifierOutput(logits=logits[:, None])

    def training_forward(self, rows: Tokens, seed: int) -> tuple[Tensor, list[tuple[slice, int, Pullback]]]:
        """Logits (pairs,) with dropout, and of each piece which pairs, padded rows, and the way back."""
        logits, ways = [], []
        for own, count in self._split(rows):
            part, pullback = self._engine.forward(self._pad(rows, own, count), seed=seed, first=own.start)
            logits.append(part)
            ways.append((own, count, pullback))
        values = [np.asarray(part)[: own.stop - own.start] for part, (own, _, _) in zip(logits, ways, strict=True)]
        return torch.from_numpy(np.concatenate(values)), ways

    def backward(self, ways: list[tuple[slice, int, Pullback]], gradient: NDArray[np.float32]) -> None:
        """Takes the gradient of the logits, (pairs,), back to the engine; padding rows have none."""
        for own, count, pullback in ways:
            padded = np.zeros(count, np.float32)
            padded[: own.stop - own.start] = gradient[own]
            self._engine.backward(pullback, padded)

    def _score(self, rows: Tokens, own: slice, count: int) -> NDArray[np.float32]:
        return np.asarray(self._engine.logits(self._pad(rows, own, count)))[: own.stop - own.start]

    def _split(self, rows: Tokens) -> list[tuple[slice, int]]:
        pairs, width = rows.ids.shape
        return list(self._shapes.chunks(pairs, self._shapes.length_of(width)))

    def _pad(self, rows: Tokens, own: slice, count: int) -> Tokens:
        """These pairs in the first of `count` rows; a padding row is one padding token, for its softmax to see."""
        short = count - (own.stop - own.start)
        wide = self._shapes.length_of(rows.ids.shape[1]) - rows.ids.shape[1]
        edges = ((0, short), (0, wide))
        return Tokens(
            ids=np.pad(rows.ids[own], edges, constant_values=self.config.pad_token_id),
            types=np.pad(rows.types[own], edges),
            lengths=np.pad(rows.lengths[own], (0, short), constant_values=1),
        )


class _Context(Protocol):
    """What a pass leaves for the way back."""

    passes: JaxModel
    ways: list[tuple[slice, int, Pullback]]


class _DevicePass(torch.autograd.Function):
    """A pass on the devices as torch's autograd sees it: the parameters' gradients stay there."""

    @staticmethod
    def forward(context: _Context, way_back: Tensor, passes: JaxModel, rows: Tokens, seed: int) -> Tensor:
        logits, context.ways = passes.training_forward(rows, seed)
        context.passes = passes
        return logits

    @staticmethod
    def backward(context: _Context, *gradients: Tensor) -> tuple[None, ...]:
        context.passes.backward(context.ways, gradients[0].numpy())
        return None, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The shapes of a run: of pairs up to `longest` tokens, at most `tokens` padded ones, all devices together."""

    longest: int
    tokens: int
    devices: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Ascending; the last is the longest pair that the scorer reads."""
        doubled = [MIN_LENGTH]
        while doubled[-1] * 2 < self.longest:
            doubled.append(doubled[-1] * 2)
        return (*(length for length in doubled if length < self.longest), self.longest)

    def length_of(self, tokens: int) -> int:
        """The length that pairs of so many tokens are padded to."""
        return next(length for length in self.lengths if length >= tokens)

    def rows(self, length: int) -> tuple[int, ...]:
        """Row counts for this length, the full one first; each is a multiple of the devices, at least one row each."""
        full = max(1, self.tokens // length)
        return tuple(-(-full // (part * self.devices)) * self.devices for part in ROW_DIVISORS)

    def chunks(self, pairs: int, length: int) -> Iterator[tuple[slice, int]]:
        """So many pairs as pieces of the row counts: which pairs, and the rows that they are padded to."""
        counts = self.rows(length)
        for start in range(0, pairs, counts[0]):
            own = min(counts[0], pairs - start)
            yield slice(start, start + own), min(count for count in counts if count >= own)


class Engine:
    """Parameters, gradients and optimizer on the devices, and the programs that move them."""

    def __init__(self, tensors: Arrays, arch: Architecture, config: TrainingSettings, devices: Sequence[jax.Device]):
        mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
        whole = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        self._whole = whole
        self._shared = NamedSharding(mesh, PartitionSpec(_AXIS))  # type: ignore[no-untyped-call]
        self._arch, self._clip = arch, config.clip
        stacked = stack(tensors)
        self._optimizer = optax.chain(
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask(stacked, arch)),
        )
        self.params: Params = jax.device_put(stacked, whole)
        self._state: optax.OptState = jax.device_put(self._optimizer.init(self.params), whole)
        self._zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=whole)
        self.sums: Params = self._zeros(self.params)
        self._logits = jax.jit(self._forward, out_shardings=whole)
        self._pass = jax.jit(self._forward_with_pullback)
        self._pull = jax.jit(_add_gradients, donate_argnums=0, out_shardings=whole)
        self._norm = jax.jit(optax.tree.norm, out_shardings=whole)
        self._apply = jax.jit(self._update, donate_argnums=(0, 1), out_shardings=whole)

    def logits(self, tokens: Tokens) -> Array:
        """Logits (rows,) without dropout."""
        logits: Array = self._logits(self.params, self.to_devices(tokens))
        return logits

    def forward(self, tokens: Tokens, *, seed: int, first: int) -> tuple[Array, Pullback]:
        """Logits (rows,) with dropout, and the way back; `seed` (32 bits) and a row's number decide its dropout.

        The numbers count from `first`.
        """
        passed: tuple[Array, Pullback] = self._pass(
            self.params, self.to_devices(tokens), np.uint32(seed), np.uint32(first)
        )
        return passed

    def backward(self, pullback: Pullback, gradient: NDArray[np.float32]) -> None:
        """Adds the parameters' gradients, given that of a pass's logits, (rows,); returns before they are computed."""
        self.sums = self._pull(self.sums, pullback, jax.device_put(gradient, self._shared))

    def to_devices(self, tokens: Tokens) -> Tokens:
        """The tokens on the devices, an equal part of the rows on each."""
        moved: Tokens = jax.device_put(tokens, self._shared)
        return moved

    def forget(self) -> None:
        """Drops the gradients."""
        self.sums = self._zeros(self.params)

    def step(self, rate: float) -> float:
        """One step of AdamW; the gradient's norm before clipping. No step where that is not a number."""
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

    def _forward(self, params: Params, tokens: _TracedTokens, keys: Array | None = None) -> Array:
        return forward(params, self._arch, tokens.ids, tokens.types, tokens.lengths, keys=keys)

    def _forward_with_pullback(
        self, params: Params, tokens: _TracedTokens, seed: Array, first: Array
    ) -> tuple[Array, Pullback]:
        numbers = first + jnp.arange(len(tokens.lengths), dtype=jnp.uint32)
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)
        return jax.vjp(lambda params: self._forward(params, tokens, keys), params)

    def _update(
        self, params: Params, state: optax.OptState, sums: Params, share: Array, rate: Array
    ) -> tuple[Params, optax.OptState]:
        clipped = jax.tree.map(lambda gradient: gradient * share, sums)
        moves, state = self._optimizer.update(clipped, state, params)
        return jax.tree.map(lambda param, move: param - rate * move, params, moves), state


def _add_gradients(sums: Params, pullback: Pullback, gradient: Array) -> Params:
    (gradients,) = pullback(gradient)
    added: Params = jax.tree.map(jnp.add, sums, gradients)
    return added


def find_devices(count: int) -> list[jax.Device]:
    """The first `count` of JAX's devices; ConfigError where there are fewer. A CPU is split into as many.

    That can only be done before JAX has computed anything in this process.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]
    present = jax.devices()
    if len(present) < count:
        has = f"JAX finds {len(present)} on the {present[0].platform}"
        raise ConfigError(f"--devices {count}: {has}; give --devices {len(present)} or less")
    return present[:count]


def _scorer_architecture(scorer: Scorer) -> Architecture:
    """The build of the scorer's encoder; ConfigError where it or its length is none of ours."""
    config, length = scorer.model.config, scorer.encoder.max_length
    arch = parse_architecture(type(scorer.model).__name__, config.to_dict() | {"num_labels": config.num_labels})
    if length > arch.positions:
        remedy = f"pretrain with --max-length {arch.positions} or less"
        raise ConfigError(f"--parallelism jax: pairs of {length} tokens in {arch.positions} positions; {remedy}")
    return arch
