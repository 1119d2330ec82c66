"""The processes that train together: what they tell each other, and how they share an update."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from cappy.training.checkpoint import Tensors, copy_tensors
from cappy.training.settings import TrainingSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter, beside the number of its steps."""
BUCKET_SIZE = 16 * 2**20
"""Numbers per all-reduce: enough to fill a link, few enough to need no second copy of the gradients."""
COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for another; whoever started them ends the rest when one of them dies, and sooner."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process is number `rank` of `count`, and number `local` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where its tensors must lie to be sent to others."""
        return torch.device("cuda", self.local) if torch.cuda.is_available() else torch.device("cpu")

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each value, the same on all."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(numbers)
        sums: list[float] = numbers.tolist()
        return sums

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replaces each gradient by its sum over the ranks, in buckets whose borders are always the same.

        Our own buckets and not DistributedDataParallel's: those are cut anew after the first update, so that a resumed
        run would add in another order than an unbroken one.
        """
        if self.count == 1:
            return
        buckets = list(_split_buckets(gradients))
        flat = [torch.cat([gradient.reshape(-1) for gradient in bucket]) for bucket in buckets]
        works = [distributed.all_reduce(bucket, async_op=True) for bucket in flat]
        for bucket, sums, work in zip(buckets, flat, works, strict=True):
            work.wait()
            for gradient, part in zip(bucket, torch.split(sums, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def broadcast_object(self, value: object) -> Any:
        """What the first rank has for `value`, which JSON can hold; torch's broadcast of objects would pickle it."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(text)], device=self.device)
        distributed.broadcast(size, 0)
        sent = bytearray(text) if self.first else bytearray(int(size))
        moved = torch.frombuffer(sent, dtype=torch.uint8).to(self.device)
        distributed.broadcast(moved, 0)
        return json.loads(bytes(moved.cpu().numpy()))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors by name, on the CPU; the others may hold none."""
        if self.count == 1:
            return dict(tensors)
        kinds = self.broadcast_object({name: (tuple(one.shape), str(one.dtype)) for name, one in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            here = tensors[name] if self.first else torch.empty(shape, dtype=getattr(torch, dtype.split(".")[-1]))
            moved = here.to(self.device).contiguous()
            distributed.broadcast(moved, 0)
            received[name] = moved.cpu()
        return received


SINGLE_RANK = Ranks()


def is_launched() -> bool:
    """Whether a launcher started this process as one rank of several (torchrun, a TrainJob, our own)."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The ranks that a launcher started, met (nccl where there is a GPU, else gloo); alone where there is none."""
    if not is_launched():
        yield SINGLE_RANK
        return
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        count=int(os.environ["WORLD_SIZE"]),
        local=int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    yield ranks
    # Only after success: a rank that failed cannot say good-bye to others that wait for it elsewhere.
    distributed.destroy_process_group()


class Strategy(Protocol):
    """How ranks share an update: `ReplicatedStrategy` says what each of these does."""

    lockstep: bool

    def zero_grad(self) -> None: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self, rate: float) -> float: ...
    def weights(self) -> Tensors: ...
    def moments(self) -> Tensors: ...
    def restore(self, weights: Tensors, moments: Tensors) -> None: ...
    def best_model(self, best: Tensors) -> nn.Module: ...


class ReplicatedStrategy:
    """The strategies `single` and `ddp`: gradients are summed over the ranks once per update, then all do the same."""

    lockstep = False
    """Whether every rank must do as many passes as every other."""

    def __init__(self, model: nn.Module, config: TrainingSettings, ranks: Ranks) -> None:
        self._model, self._clip, self._ranks = model, config.clip, ranks
        self._optimizer = adamw(model, config)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self._optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of this rank's share; `last` of the update."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        """One step at this learning rate; the gradient's norm before clipping. No step where that is not a number."""
        self._sum_gradients()
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or math.inf))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if norm < float("inf"):
            self._optimizer.step()
        return norm

    def weights(self) -> Tensors:
        """A copy of the weights, on the CPU."""
        return copy_tensors(self._model.state_dict())

    def moments(self) -> Tensors:
        """A copy of the optimizer's state, by parameter and moment."""
        return moments_of(self._model, self._optimizer)

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Puts a checkpoint's tensors in place."""
        self._model.load_state_dict(weights)
        restore_moments(self._model, self._optimizer, moments)

    def best_model(self, best: Tensors) -> nn.Module:
        """The model with the best weights."""
        self._model.load_state_dict(best)
        return self._model

    def _sum_gradients(self) -> None:
        """Sums the gradients over the ranks; a parameter that no rank used keeps none, as on one rank."""
        if self._ranks.count == 1:
            return
        parameters = list(self._model.parameters())
        used = self._ranks.all_reduce([float(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, count in zip(parameters, used, strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        self._ranks.sum_gradients(gradients)


def adamw(model: nn.Module, config: TrainingSettings) -> torch.optim.AdamW:
    """AdamW that spares biases and norms its weight decay; the rate is set at every step."""
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    plain = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)


def moments_of(model: nn.Module, optimizer: torch.optim.AdamW) -> Tensors:
    """A copy of the optimizer's state by parameter and moment, on the CPU."""
    return copy_tensors(
        {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )


def restore_moments(model: nn.Module, optimizer: torch.optim.AdamW, moments: Tensors) -> None:
    """Puts the optimizer's state in place; the counts of steps stay on the CPU, as AdamW keeps them."""
    for name, parameter in model.named_parameters():
        for key in ("step", *MOMENTS):
            if (value := moments.get(f"{name}.{key}")) is not None:
                device = "cpu" if key == "step" else parameter.device
                optimizer.state[parameter][key] = value.to(device, copy=True)


def _split_buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
