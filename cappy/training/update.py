"""One update: the gradients of a batch of whole instances, in as many passes as memory needs."""

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cappy.errors import TrainingError
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import State, Tensors
from cappy.training.corpus import Corpus
from cappy.training.feed import Drawn, comparable, dealt, micro_batches, padded
from cappy.training.losses import instance_losses
from cappy.training.plan import TrainingSettings
from cappy.training.ranks import Ranks

EXPLODED = 100.0
"""A loss so many times its running mean, and above `LARGE`, is an explosion: labels lie in 0 to 1."""
LARGE = 10.0


class Strategy(Protocol):
    """How ranks share an update: `replicas.Replicas` says what each of these does."""

    lockstep: bool

    def forget(self) -> None: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self, rate: float) -> float: ...
    def weights(self) -> Tensors: ...
    def moments(self) -> Tensors: ...
    def restore(self, weights: Tensors, moments: Tensors) -> None: ...
    def finished(self, best: Tensors) -> nn.Module: ...


class UnwellError(Exception):
    """The loss or the gradient is nothing to go on with; the text says which."""


class MemoryShortError(Exception):
    """A pass did not fit the memory of some rank."""


def update(
    scorer: Scorer,
    strategy: Strategy,
    corpus: Corpus,
    batch: Sequence[Drawn],
    plan: TrainingSettings,
    state: State,
    *,
    rate: float,
    ranks: Ranks,
) -> float:
    """One step of the optimizer; the mean loss over the instances of the whole batch.

    Halves `state.budget` and does the passes again where memory runs out. UnwellError where the loss or the gradient
    is no number or the loss explodes: what is in memory is then not worth keeping.
    """
    scorer.model.train()
    while True:
        try:
            loss = _gradients(scorer, strategy, corpus, batch, plan, state, ranks)
            break
        except MemoryShortError:
            _halve(state, batch)
    if not loss < (max(LARGE, EXPLODED * state.running_loss) if state.update else math.inf):
        raise UnwellError(f"the loss is {loss:.4g}")
    norm = strategy.step(rate)
    if not norm < math.inf:
        raise UnwellError(f"the gradient's norm is {norm:.4g}")
    return loss


def _gradients(
    scorer: Scorer,
    strategy: Strategy,
    corpus: Corpus,
    batch: Sequence[Drawn],
    plan: TrainingSettings,
    state: State,
    ranks: Ranks,
) -> float:
    """Leaves this rank's share of the gradients; the loss of the whole batch, or MemoryShortError on all ranks.

    Passes are cut from the whole batch and seeded by their number, then dealt: as long as there are as many as ranks,
    any number of ranks computes the same ones, dropout included.
    """
    micros = micro_batches(batch, state.budget, ranks.count)
    mine = dealt([padded(micro) for micro in micros], ranks.rank, ranks.count)
    weights = [1.0] * len(mine)
    if strategy.lockstep:
        most = max(len(dealt([padded(m) for m in micros], rank, ranks.count)) for rank in range(ranks.count))
        # A rank with fewer passes does one again without weight: its gradient is zero, but the others do not wait.
        weights += [0.0] * (most - len(mine))
        mine += [mine[0] if mine else 0] * (most - len(mine))
    strategy.forget()
    total, short = 0.0, 0.0
    try:
        for done, (number, weight) in enumerate(zip(mine, weights, strict=True), start=1):
            torch.manual_seed(_seed(plan.seed, state.update, number))
            loss = _pass(scorer, corpus, micros[number], plan) * (weight / len(batch))
            strategy.backward(loss, last=done == len(mine))
            total += loss.item()
    except (RuntimeError, MemoryError) as error:
        if not _of_memory(error):
            raise
        if strategy.lockstep:
            remedy = "give a smaller --batch-tokens and run the same command again"
            raise TrainingError(f"memory ran out at {state.budget} tokens per pass; {remedy}") from error
        short = 1.0
    total, short = ranks.summed([total, short])
    if short:
        strategy.forget()
        raise MemoryShortError
    return total


def _pass(scorer: Scorer, corpus: Corpus, micro: Sequence[Drawn], plan: TrainingSettings) -> Tensor:
    """The sum of the instances' losses."""
    logits = scorer.logits([pair for drawn in micro for pair in corpus.pairs(drawn.index, drawn.chosen)])
    labels = [label for drawn in micro for label in corpus.labels(drawn.index, drawn.chosen)]
    numbers = [number for number, drawn in enumerate(micro) for _ in drawn.chosen]
    compared = [flag for drawn in micro for flag in comparable(drawn.chosen, corpus.selectable(drawn.index))]
    losses = instance_losses(
        logits,
        torch.tensor(labels, device=logits.device),
        torch.tensor(numbers, device=logits.device),
        len(micro),
        compared=torch.tensor(compared, device=logits.device),
        weights=_weights(corpus, micro, plan, logits.device) if plan.weights else None,
        head=scorer.head,
        relative=plan.relative,
        listwise=plan.listwise,
    )
    return losses.sum()


def _weights(corpus: Corpus, micro: Sequence[Drawn], plan: TrainingSettings, device: torch.device) -> Tensor:
    """The weight of every pair by its source, (pairs,)."""
    by_source = plan.source_weights
    sources = (source for drawn in micro for source in corpus.sources(drawn.index, drawn.chosen))
    return torch.tensor([by_source[source] for source in sources], device=device)


def _seed(seed: int, update: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed} {update} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out; torch on a CPU, and JAX, say so by a plain RuntimeError."""
    said = str(error)
    short = "allocate memory" in said or said.startswith("RESOURCE_EXHAUSTED")
    return short or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _halve(state: State, batch: Sequence[Drawn]) -> None:
    largest = max(drawn.tokens for drawn in batch)
    if state.budget // 2 < max(drawn.width for drawn in batch):
        remedy = "give a smaller --max-candidates, or pretrain with a smaller --max-length"
        raise TrainingError(f"memory ran out for one instance of {largest} padded tokens; {remedy}")
    state.budget //= 2
    state.events.append(f"update {state.update + 1}: memory ran out; on with {state.budget} tokens per pass")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
