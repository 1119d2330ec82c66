"""The strategy `jax`: the encoder's passes and AdamW run in JAX on every device of this machine, the rest in torch.

What stands in the scorer for its model hands tokens to the devices and takes logits back. The losses are torch's, on
the host; their gradient goes back the same way. So feed, losses, checks and checkpoints are those of the one loop.
"""

import contextlib
from typing import Any

import jax
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from cappy.errors import ConfigError
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import Tensors
from cappy.training.distributed import MOMENTS
from cappy.training.settings import TrainingSettings
from cappy.training.tpu.encoder import Architecture, architecture
from cappy.training.tpu.engine import Engine, Pullback, Tokens
from cappy.training.tpu.shapes import Shapes
from cappy.training.tpu.weights import from_torch, to_torch

STEPS = "step"


class OnDevices:
    """JAX's engine behind the methods of `Replicas`; the scorer's model is `Passes` until training has ended."""

    lockstep = False

    def __init__(self, scorer: Scorer, plan: TrainingSettings) -> None:
        self._model: Any = scorer.model
        arch = _architecture(scorer)
        self.engine = Engine(from_torch(self._model.state_dict()), arch, plan, devices(plan.devices))
        shapes = Shapes(longest=scorer.encoder.max_length, tokens=plan.batch_tokens, devices=plan.devices)
        scorer.model = Passes(self.engine, shapes, self._model.config)

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
        found = {f"{name}.{STEPS}": torch.tensor(float(steps)) for name in moments[0]}
        for key, arrays in zip(MOMENTS, moments, strict=True):
            found |= {f"{name}.{key}": tensor for name, tensor in to_torch(arrays).items()}
        return found

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Puts a checkpoint's tensors in place."""
        named = [from_torch({name: moments[f"{name}.{key}"] for name in weights}) for key in MOMENTS if moments]
        steps = {int(tensor) for name, tensor in moments.items() if name.endswith(f".{STEPS}")}
        self.engine.restore(from_torch(weights), (steps.pop(), named[0], named[1]) if moments else None)

    def finished(self, best: Tensors) -> nn.Module:
        """The model that the scorer had, with the best weights."""
        self._model.load_state_dict(best)
        model: nn.Module = self._model
        return model


class Passes(nn.Module):
    """Called as the model is: pads to the engine's shapes, runs there, and lets torch's `backward` find its way."""

    def __init__(self, engine: Engine, shapes: Shapes, config: Any) -> None:
        super().__init__()
        self.config = config
        self._engine, self._shapes = engine, shapes
        self._way_back = nn.Parameter(torch.zeros(()))
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Logits (pairs, 1), on the CPU."""
        lengths = attention_mask.sum(dim=1)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = Tokens(*(tensor.cpu().numpy().astype(np.int32) for tensor in (input_ids, types, lengths)))
        if self.training:
            seed = int(torch.randint(2**31, ()))
            logits: Tensor = _Trained.apply(self._way_back, self, rows, seed)  # type: ignore[no-untyped-call]
        else:
            scored = [self._scored(rows, own, count) for own, count in self._cut(rows)]
            logits = torch.from_numpy(np.concatenate(scored))
        return SequenceClassifierOutput(logits=logits[:, None])

    def trained(self, rows: Tokens, seed: int) -> tuple[Tensor, list[tuple[slice, int, Pullback]]]:
        """Logits (pairs,) with dropout, and of each piece which pairs, padded rows, and the way back."""
        logits, ways = [], []
        for own, count in self._cut(rows):
            found, pullback = self._engine.passed(self._padded(rows, own, count), seed=seed, first=own.start)
            logits.append(found)
            ways.append((own, count, pullback))
        values = [np.asarray(found)[: own.stop - own.start] for found, (own, _, _) in zip(logits, ways, strict=True)]
        return torch.from_numpy(np.concatenate(values)), ways

    def pull(self, ways: list[tuple[slice, int, Pullback]], gradient: NDArray[np.float32]) -> None:
        """Takes the gradient of the logits, (pairs,), back to the engine; padding rows have none."""
        for own, count, pullback in ways:
            padded = np.zeros(count, np.float32)
            padded[: own.stop - own.start] = gradient[own]
            self._engine.pull(pullback, padded)

    def _scored(self, rows: Tokens, own: slice, count: int) -> NDArray[np.float32]:
        return np.asarray(self._engine.logits(self._padded(rows, own, count)))[: own.stop - own.start]

    def _cut(self, rows: Tokens) -> list[tuple[slice, int]]:
        pairs, width = rows.ids.shape
        return list(self._shapes.pieces(pairs, self._shapes.length_of(width)))

    def _padded(self, rows: Tokens, own: slice, count: int) -> Tokens:
        """These pairs in the first of `count` rows; a padding row is one padding token, for its softmax to see."""
        short = count - (own.stop - own.start)
        wide = self._shapes.length_of(rows.ids.shape[1]) - rows.ids.shape[1]
        edges = ((0, short), (0, wide))
        return Tokens(
            ids=np.pad(rows.ids[own], edges, constant_values=self.config.pad_token_id),
            types=np.pad(rows.types[own], edges),
            lengths=np.pad(rows.lengths[own], (0, short), constant_values=1),
        )


class _Trained(torch.autograd.Function):
    """A pass on the devices as torch's autograd sees it: the parameters' gradients stay there."""

    @staticmethod
    def forward(context: Any, way_back: Tensor, passes: Passes, rows: Tokens, seed: int) -> Tensor:
        logits, context.ways = passes.trained(rows, seed)
        context.passes = passes
        return logits

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, ...]:
        context.passes.pull(context.ways, gradients[0].numpy())
        return None, None, None, None


def devices(count: int) -> list[jax.Device]:
    """The first `count` of JAX's devices; ConfigError where there are fewer. A CPU is split into as many.

    That can only be done before JAX has computed anything in this process.
    """
    if count > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]
    found = jax.devices()
    if len(found) < count:
        told = f"JAX finds {len(found)} on the {found[0].platform}"
        raise ConfigError(f"--devices {count}: {told}; give --devices {len(found)} or less")
    return found[:count]


def _architecture(scorer: Scorer) -> Architecture:
    """The build of the scorer's encoder; ConfigError where it or its length is none of ours."""
    config, length = scorer.model.config, scorer.encoder.max_length
    arch = architecture(type(scorer.model).__name__, {**config.to_dict(), "num_labels": config.num_labels})
    if length > arch.positions:
        remedy = f"pretrain with --max-length {arch.positions} or less"
        raise ConfigError(f"--strategy jax: pairs of {length} tokens in {arch.positions} positions; {remedy}")
    return arch
