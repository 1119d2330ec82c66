"""Data-parallel training: collective operations between ranks, and the strategies `single` and `ddp`."""

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
"""Keys of the moments in torch's AdamW state of a parameter, which also has "step"."""
BUCKET_SIZE = 16 * 2**20
"""Gradient elements per all-reduce, enough to saturate a link.

All buckets are in flight at once, so they take as much memory as the gradients.
"""
COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for another. If a rank dies, the launcher ends the others much earlier."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together: `rank` is the index of this process among all `size` processes.

    `local_rank` is its index among the processes of its machine. Both start at 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device that tensors must be on for collective operations."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the ranks, on all ranks."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replaces each gradient in place with its sum over the ranks, in fixed buckets.

        DistributedDataParallel is not used because it rebuilds its buckets after the first update, so a resumed run
        would add in a different order than an uninterrupted one.
        """
        if self.size == 1:
            return
        buckets = list(_split_buckets(gradients))
        flat_buckets = [torch.cat([gradient.reshape(-1) for gradient in bucket]) for bucket in buckets]
        handles = [distributed.all_reduce(bucket, async_op=True) for bucket in flat_buckets]
        for bucket, flat, handle in zip(buckets, flat_buckets, handles, strict=True):
            handle.wait()
            for gradient, summed in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def broadcast_object(self, value: object) -> Any:
        """The first rank's `value`, sent as JSON, because torch's own broadcast of objects uses pickle."""
        if self.size == 1:
            return value
        encoded = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(encoded)], device=self.device)
        distributed.broadcast(size, 0)
        buffer = bytearray(encoded) if self.first else bytearray(int(size))
        tensor = torch.frombuffer(buffer, dtype=torch.uint8).to(self.device)
        distributed.broadcast(tensor, 0)
        return json.loads(bytes(tensor.cpu().numpy()))

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors by name, on the CPU; the other ranks may pass an empty mapping."""
        if self.size == 1:
            return dict(tensors)
        specs = self.broadcast_object(
            {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
        )
        received = {}
        for name, (shape, dtype) in specs.items():
            tensor = tensors[name] if self.first else torch.empty(shape, dtype=getattr(torch, dtype.split(".")[-1]))
            buffer = tensor.to(self.device).contiguous()
            distributed.broadcast(buffer, 0)
            received[name] = buffer.cpu()
        return received


SINGLE_RANK = World()


def is_launched() -> bool:
    """Whether a launcher (torchrun, a TrainJob or `cappy.training.launch`) started this process as a rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def join_ranks() -> Iterator[World]:
    """Joins the ranks that a launcher started (nccl with a GPU, else gloo); yields a single rank without a launcher."""
    if not is_launched():
        yield SINGLE_RANK
        return
    world = World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    yield world
    # Only after success: after an error this would wait for ranks that are blocked in another operation.
    distributed.destroy_process_group()


class Strategy(Protocol):
    """How ranks share an update; `ReplicatedStrategy` documents the methods."""

    lockstep: bool

    def zero_grad(self) -> None: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self, rate: float) -> float: ...
    def weights(self) -> Tensors: ...
    def moments(self) -> Tensors: ...
    def restore(self, weights: Tensors, moments: Tensors) -> None: ...
    def best_model(self, best: Tensors) -> nn.Module: ...


class ReplicatedStrategy:
    """The strategies `single` and `ddp`: gradients are summed over the ranks once per update, then all ranks step."""

    lockstep = False
    """Whether all ranks must do the same number of passes."""

    def __init__(self, model: nn.Module, config: TrainingSettings, world: World) -> None:
        self._model, self._clip, self._world = model, config.clip, world
        self._optimizer = adamw(model, config)

    def zero_grad(self) -> None:
        """Resets the gradients."""
        self._optimizer.zero_grad()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates the gradients of one of this rank's passes; `last` marks the last pass of the update."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> float:
        """Steps at this learning rate unless the gradient's norm is not finite; returns the norm before clipping."""
        self._sum_gradients()
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or math.inf))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if norm < float("inf"):
            self._optimizer.step()
        return norm

    def weights(self) -> Tensors:
        """A copy of the weights on the CPU."""
        return copy_tensors(self._model.state_dict())

    def moments(self) -> Tensors:
        """A copy of the optimizer's state on the CPU, with keys "parameter.moment"."""
        return moments_of(self._model, self._optimizer)

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Loads a checkpoint's tensors."""
        self._model.load_state_dict(weights)
        restore_moments(self._model, self._optimizer, moments)

    def best_model(self, best: Tensors) -> nn.Module:
        """The model with the best weights."""
        self._model.load_state_dict(best)
        return self._model

    def _sum_gradients(self) -> None:
        """Sums the gradients over the ranks; a parameter that no rank used has no gradient, as with one rank."""
        if self._world.size == 1:
            return
        parameters = list(self._model.parameters())
        ranks_using = self._world.all_reduce([float(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, count in zip(parameters, ranks_using, strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        self._world.sum_gradients(gradients)


def adamw(model: nn.Module, config: TrainingSettings) -> torch.optim.AdamW:
    """AdamW without weight decay on biases and norms; the learning rate is set at every step."""
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    not_decayed = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)


def moments_of(model: nn.Module, optimizer: torch.optim.AdamW) -> Tensors:
    """A copy of the optimizer's state on the CPU, with keys "parameter.moment"."""
    return copy_tensors(
        {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )


def restore_moments(model: nn.Module, optimizer: torch.optim.AdamW, moments: Tensors) -> None:
    """Loads the optimizer's state; step counts stay on the CPU, where AdamW keeps them."""
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
