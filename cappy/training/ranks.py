"""The processes that train together: who this one is, and the few things that they tell each other."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

BUCKET = 16 * 2**20
"""Numbers per all-reduce: enough to fill a link, few enough to need no second copy of the gradients."""
PATIENCE = timedelta(hours=2)
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
        """Where its tensors must lie to be told to others."""
        return torch.device("cuda", self.local) if torch.cuda.is_available() else torch.device("cpu")

    def summed(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each value, the same on all."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(numbers)
        found: list[float] = numbers.tolist()
        return found

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replaces each gradient by its sum over the ranks, in buckets whose borders are always the same.

        Our own buckets and not DistributedDataParallel's: those are cut anew after the first update, so that a resumed
        run would add in another order than an unbroken one.
        """
        if self.count == 1:
            return
        buckets = list(_buckets(gradients))
        flat = [torch.cat([gradient.reshape(-1) for gradient in bucket]) for bucket in buckets]
        works = [distributed.all_reduce(bucket, async_op=True) for bucket in flat]
        for bucket, sums, work in zip(buckets, flat, works, strict=True):
            work.wait()
            for gradient, part in zip(bucket, torch.split(sums, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def told(self, value: Any) -> Any:
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

    def given(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors by name, on the CPU; the others may hold none."""
        if self.count == 1:
            return dict(tensors)
        kinds = self.told({name: (tuple(one.shape), str(one.dtype)) for name, one in tensors.items()})
        found = {}
        for name, (shape, dtype) in kinds.items():
            here = tensors[name] if self.first else torch.empty(shape, dtype=getattr(torch, dtype.split(".")[-1]))
            moved = here.to(self.device).contiguous()
            distributed.broadcast(moved, 0)
            found[name] = moved.cpu()
        return found


ALONE = Ranks()


def started() -> bool:
    """Whether a launcher started this process as one rank of several (torchrun, a TrainJob, our own)."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that a launcher started, met (nccl where there is a GPU, else gloo); alone where there is none."""
    if not started():
        yield ALONE
        return
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        count=int(os.environ["WORLD_SIZE"]),
        local=int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    yield ranks
    # Only after success: a rank that failed cannot say good-bye to others that wait for it elsewhere.
    distributed.destroy_process_group()


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
