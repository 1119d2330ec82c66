"""The strategy `jax`: runs the encoder's passes and AdamW in JAX, on devices of this machine, and the rest in torch.

During training `JaxModel` replaces the scorer's model: it sends tokens to the devices and returns their logits. The
losses are computed by torch on the host, and their gradient is sent to the devices. So batches, losses, checks and
checkpoints are those of the shared loop.

Training is data-parallel: the rows of a pass are sharded over the devices, parameters and optimizer are replicated, and
gradients are summed. So results depend on the number of devices only through the order of float additions. XLA compiles
one program per shape, so every pass is split and padded to one of a few shapes.

In array shapes, "pairs" is the number of pairs in a pass, "rows" is that number padded to one of `Shapes.rows`, and
"length" is the padded number of tokens per row.
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
    decay_mask,
    forward,
    from_torch,
    parse_architecture,
    stack,
    to_torch,
    unstack,
)

STEP_KEY = "step"
MIN_LENGTH = 32
"""Tokens of the shortest shape; lengths double from there up to the scorer's maximum."""
ROW_DIVISORS = (1, 2, 4)
"""The row counts of a length are the full count divided by these."""
_AXIS = "rows"
Pullback = Callable[[Array], tuple[Params]]
"""Maps the gradient of the logits to that of the parameters; it holds the activations of the pass on the devices."""


class TokenArrays(NamedTuple):
    """Right-padded rows: token ids and token types (rows, length), and each row's number of tokens (rows,), >= 1."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    lengths: NDArray[np.int32]


class _TracedTokens(Protocol):
    """`TokenArrays` as seen in a function that JAX traces, with JAX's arrays."""

    @property
    def ids(self) -> Array: ...

    @property
    def types(self) -> Array: ...

    @property
    def lengths(self) -> Array: ...


class JaxStrategy:
    """Trains in JAX; has the methods of `ReplicatedStrategy`. Replaces the scorer's model with a `JaxModel`."""

    lockstep = False

    def __init__(self, scorer: Scorer, config: TrainingSettings) -> None:
        self._model = scorer.model
        arch = _scorer_architecture(scorer)
        self.engine = JaxEngine(from_torch(self._model.state_dict()), arch, config, find_devices(config.devices))
        shapes = Shapes(longest=scorer.encoder.max_length, tokens=config.batch_tokens, devices=config.devices)
        scorer.model = JaxModel(self.engine, shapes, self._model.config)

    def zero_grad(self) -> None:
        """Resets the gradients."""
        self.engine.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Like `ReplicatedStrategy.backward`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        """Like `ReplicatedStrategy.step`."""
        return self.engine.step(rate)

    def weights(self) -> Tensors:
        """A copy of the weights on the CPU."""
        return to_torch(self.engine.weights())

    def moments(self) -> Tensors:
        """A copy of the optimizer's state on the CPU, with keys "parameter.moment"."""
        step_count, *moments = self.engine.moments()
        tensors = {f"{name}.{STEP_KEY}": torch.tensor(float(step_count)) for name in moments[0]}
        for key, arrays in zip(MOMENTS, moments, strict=True):
            tensors |= {f"{name}.{key}": tensor for name, tensor in to_torch(arrays).items()}
        return tensors

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Loads a checkpoint's tensors."""
        by_moment = [from_torch({name: moments[f"{name}.{key}"] for name in weights}) for key in MOMENTS if moments]
        step_counts = {int(tensor) for name, tensor in moments.items() if name.endswith(f".{STEP_KEY}")}
        self.engine.restore(from_torch(weights), (step_counts.pop(), by_moment[0], by_moment[1]) if moments else None)

    def best_model(self, best: Tensors) -> nn.Module:
        """The scorer's original torch model with the best weights."""
        self._model.load_state_dict(best)
        model: nn.Module = self._model
        return model


class JaxModel(nn.Module):
    """Stands in for the scorer's model: pads batches to the fixed shapes and runs them on the engine, with autograd."""

    def __init__(self, engine: "JaxEngine", shapes: "Shapes", config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self._engine, self._shapes = engine, shapes
        self._grad_anchor = nn.Parameter(torch.zeros(()))  # Autograd skips a function whose inputs need no gradient.
        self.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits (pairs, 1), on the CPU."""
        lengths = attention_mask.sum(dim=1)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        tokens = TokenArrays(*(tensor.cpu().numpy().astype(np.int32) for tensor in (input_ids, types, lengths)))
        if self.training:
            seed = int(torch.randint(2**31, ()))
            logits: Tensor = _DevicePass.apply(self._grad_anchor, self, tokens, seed)  # type: ignore[no-untyped-call]
        else:
            chunk_logits = [self._score(tokens, chunk, rows) for chunk, rows in self._split(tokens)]
            logits = torch.from_numpy(np.concatenate(chunk_logits))
        return SequenceClassifierOutput(logits=logits[:, None])

    def training_forward(self, tokens: TokenArrays, seed: int) -> tuple[Tensor, list[tuple[slice, int, Pullback]]]:
        """Logits (pairs,) with dropout, and for each chunk the slice of its pairs, its padded rows and its pullback."""
        outputs, pullbacks = [], []
        for chunk, rows in self._split(tokens):
            logits, pullback = self._engine.forward(self._pad(tokens, chunk, rows), seed=seed, first=chunk.start)
            outputs.append(logits)
            pullbacks.append((chunk, rows, pullback))
        chunk_logits = [
            np.asarray(logits)[: chunk.stop - chunk.start]
            for logits, (chunk, _, _) in zip(outputs, pullbacks, strict=True)
        ]
        return torch.from_numpy(np.concatenate(chunk_logits)), pullbacks

    def backward(self, pullbacks: list[tuple[slice, int, Pullback]], gradient: NDArray[np.float32]) -> None:
        """Passes the gradient of the logits, (pairs,), to the engine, with zeros for padding rows."""
        for chunk, rows, pullback in pullbacks:
            padded = np.zeros(rows, np.float32)
            padded[: chunk.stop - chunk.start] = gradient[chunk]
            self._engine.backward(pullback, padded)

    def _score(self, tokens: TokenArrays, chunk: slice, rows: int) -> NDArray[np.float32]:
        return np.asarray(self._engine.logits(self._pad(tokens, chunk, rows)))[: chunk.stop - chunk.start]

    def _split(self, tokens: TokenArrays) -> list[tuple[slice, int]]:
        pairs, width = tokens.ids.shape
        return list(self._shapes.chunks(pairs, self._shapes.length_of(width)))

    def _pad(self, tokens: TokenArrays, chunk: slice, rows: int) -> TokenArrays:
        """The pairs of the chunk padded to `rows` rows; a padding row has one token, so that its softmax is defined."""
        padding_rows = rows - (chunk.stop - chunk.start)
        padding_tokens = self._shapes.length_of(tokens.ids.shape[1]) - tokens.ids.shape[1]
        edges = ((0, padding_rows), (0, padding_tokens))
        return TokenArrays(
            ids=np.pad(tokens.ids[chunk], edges, constant_values=self.config.pad_token_id),
            types=np.pad(tokens.types[chunk], edges),
            lengths=np.pad(tokens.lengths[chunk], (0, padding_rows), constant_values=1),
        )


class _Context(Protocol):
    """The attributes that `_DevicePass` saves for its backward pass."""

    model: JaxModel
    pullbacks: list[tuple[slice, int, Pullback]]


class _DevicePass(torch.autograd.Function):
    """A pass on the devices as an autograd function; the parameters' gradients stay on the devices."""

    @staticmethod
    def forward(context: _Context, grad_anchor: Tensor, model: JaxModel, tokens: TokenArrays, seed: int) -> Tensor:
        logits, context.pullbacks = model.training_forward(tokens, seed)
        context.model = model
        return logits

    @staticmethod
    def backward(context: _Context, *gradients: Tensor) -> tuple[None, ...]:
        context.model.backward(context.pullbacks, gradients[0].numpy())
        return None, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The array shapes of a run: up to `longest` tokens per pair, and up to `tokens` padded tokens on all devices."""

    longest: int
    tokens: int
    devices: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths, ascending; the last is `longest`."""
        doubled = [MIN_LENGTH]
        while doubled[-1] * 2 < self.longest:
            doubled.append(doubled[-1] * 2)
        return (*(length for length in doubled if length < self.longest), self.longest)

    def length_of(self, tokens: int) -> int:
        """The length to which pairs of this many tokens are padded."""
        return next(length for length in self.lengths if length >= tokens)

    def rows(self, length: int) -> tuple[int, ...]:
        """The row counts for this length, the largest first; each is a positive multiple of the number of devices."""
        full_rows = max(1, self.tokens // length)
        return tuple(-(-full_rows // (divisor * self.devices)) * self.devices for divisor in ROW_DIVISORS)

    def chunks(self, pairs: int, length: int) -> Iterator[tuple[slice, int]]:
        """Splits this many pairs into chunks; yields the slice of each and the number of rows it is padded to."""
        row_counts = self.rows(length)
        for start in range(0, pairs, row_counts[0]):
            size = min(row_counts[0], pairs - start)
            yield slice(start, start + size), min(rows for rows in row_counts if rows >= size)


class JaxEngine:
    """Parameters, gradients and optimizer on the devices, and the compiled programs."""

    def __init__(self, tensors: Arrays, arch: Architecture, config: TrainingSettings, devices: Sequence[jax.Device]):
        mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
        replicated = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        self._replicated = replicated
        self._sharded = NamedSharding(mesh, PartitionSpec(_AXIS))  # type: ignore[no-untyped-call]
        self._arch, self._clip = arch, config.clip
        stacked = stack(tensors)
        self._optimizer = optax.chain(
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask(stacked, arch)),
        )
        self.params: Params = jax.device_put(stacked, replicated)
        self._state: optax.OptState = jax.device_put(self._optimizer.init(self.params), replicated)
        self._zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), out_shardings=replicated)
        self.gradient_sums: Params = self._zeros(self.params)
        self._logits = jax.jit(self._forward, out_shardings=replicated)
        self._pass = jax.jit(self._forward_with_pullback)
        self._accumulate = jax.jit(_add_gradients, donate_argnums=0, out_shardings=replicated)
        self._norm = jax.jit(optax.tree.norm, out_shardings=replicated)
        self._apply = jax.jit(self._update, donate_argnums=(0, 1), out_shardings=replicated)

    def logits(self, tokens: TokenArrays) -> Array:
        """Logits (rows,) without dropout."""
        logits: Array = self._logits(self.params, self.to_devices(tokens))
        return logits

    def forward(self, tokens: TokenArrays, *, seed: int, first: int) -> tuple[Array, Pullback]:
        """Logits (rows,) with dropout, and the pullback.

        A row's dropout depends only on `seed` (32 bits) and its index in the pass; `first` is the index of row 0.
        """
        result: tuple[Array, Pullback] = self._pass(
            self.params, self.to_devices(tokens), np.uint32(seed), np.uint32(first)
        )
        return result

    def backward(self, pullback: Pullback, gradient: NDArray[np.float32]) -> None:
        """Adds the parameters' gradients, given that of a pass's logits, (rows,); returns before they are computed."""
        self.gradient_sums = self._accumulate(self.gradient_sums, pullback, jax.device_put(gradient, self._sharded))

    def to_devices(self, tokens: TokenArrays) -> TokenArrays:
        """The tokens on the devices, with the rows sharded equally."""
        tokens_on_devices: TokenArrays = jax.device_put(tokens, self._sharded)
        return tokens_on_devices

    def zero_grad(self) -> None:
        """Resets the gradients."""
        self.gradient_sums = self._zeros(self.params)

    def step(self, rate: float) -> float:
        """Steps AdamW unless the gradient's norm is not finite; returns the norm before clipping."""
        norm = float(self._norm(self.gradient_sums))
        if norm < float("inf"):
            scale = np.float32(min(1.0, (self._clip or math.inf) / (norm + 1e-6)))
            self.params, self._state = self._apply(
                self.params, self._state, self.gradient_sums, scale, np.float32(rate)
            )
        return norm

    def weights(self) -> Arrays:
        """The parameters by their names in the scorer folder, on the host."""
        return unstack(self.params)

    def moments(self) -> tuple[int, Arrays, Arrays]:
        """AdamW's state: the number of steps and the two moments, named like `weights`, on the host."""
        adam = self._state[0]
        return int(adam.count), unstack(adam.mu), unstack(adam.nu)

    def restore(self, weights: Arrays, moments: tuple[int, Arrays, Arrays] | None) -> None:
        """Loads parameters and AdamW's state from the host; without moments, AdamW's state is reset."""
        self.params = jax.device_put(stack(weights), self._replicated)
        state = self._optimizer.init(self.params)
        if moments is not None:
            count, first, second = moments
            adam = state[0]._replace(count=np.int32(count), mu=stack(first), nu=stack(second))
            state = (adam, *state[1:])
        self._state = jax.device_put(state, self._replicated)

    def _forward(self, params: Params, tokens: _TracedTokens, keys: Array | None = None) -> Array:
        return forward(params, self._arch, tokens.ids, tokens.types, tokens.lengths, keys=keys)

    def _forward_with_pullback(
        self, params: Params, tokens: _TracedTokens, seed: Array, first: Array
    ) -> tuple[Array, Pullback]:
        row_indices = first + jnp.arange(len(tokens.lengths), dtype=jnp.uint32)
        keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(row_indices)
        return jax.vjp(lambda params: self._forward(params, tokens, keys), params)

    def _update(
        self, params: Params, state: optax.OptState, sums: Params, scale: Array, rate: Array
    ) -> tuple[Params, optax.OptState]:
        clipped = jax.tree.map(lambda gradient: gradient * scale, sums)
        steps, state = self._optimizer.update(clipped, state, params)
        return jax.tree.map(lambda param, step: param - rate * step, params, steps), state


def _add_gradients(sums: Params, pullback: Pullback, gradient: Array) -> Params:
    (gradients,) = pullback(gradient)
    new_sums: Params = jax.tree.map(jnp.add, sums, gradients)
    return new_sums


def find_devices(count: int) -> list[jax.Device]:
    """The first `count` of JAX's devices; raises ConfigError if there are fewer.

    A CPU is split into `count` devices, which is possible only before JAX computes anything in this process.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]
    available = jax.devices()
    if len(available) < count:
        problem = f"JAX finds {len(available)} on platform {available[0].platform}"
        raise ConfigError(f"--devices {count}: {problem}; give --devices {len(available)} or less")
    return available[:count]


def _scorer_architecture(scorer: Scorer) -> Architecture:
    """The architecture of the scorer's encoder; raises ConfigError if it or its maximum length is not supported."""
    config, length = scorer.model.config, scorer.encoder.max_length
    arch = parse_architecture(type(scorer.model).__name__, config.to_dict() | {"num_labels": config.num_labels})
    if length > arch.positions:
        remedy = f"pretrain with --max-length {arch.positions} or less"
        raise ConfigError(
            f"--parallelism jax: pairs have {length} tokens, but the encoder has {arch.positions} positions; {remedy}"
        )
    return arch


def count_tpus() -> int:
    """The number of TPU devices of this machine."""
    try:
        return len(jax.devices("tpu"))
    except RuntimeError:  # There is no such backend.
        return 0
