"""One update: its learning rate, and the gradients of a batch of whole instances in as many passes as memory needs."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cappy.errors import TrainingError
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import State
from cappy.training.corpus import Corpus
from cappy.training.distributed import Ranks, Strategy
from cappy.training.feed import Draw, comparison_mask, micro_batches, padded_tokens, assign_passes
from cappy.training.losses import Pairs, instance_losses
from cappy.training.settings import Schedule, TrainingSettings

PUBLISHED_MICRO_BATCHES = 16
"""Micro-batches of an update in the published finetuning."""
EXPLOSION_RATIO = 100.0
"""A loss so many times its running mean, and above `MIN_EXPLODED_LOSS`, is an explosion: labels lie in 0 to 1."""
MIN_EXPLODED_LOSS = 10.0


class DivergedError(Exception):
    """The loss or the gradient is nothing to go on with; the text says which."""


class PassMemoryError(Exception):
    """A pass did not fit the memory of some rank."""


def learning_rate(update: int, updates: int, peak: float, warmup: float, schedule: Schedule = "linear") -> float:
    """Learning rate of an update (0-based): a linear rise over the warm-up share, then a linear fall to zero.

    Counted in updates of the optimizer. The published code planned its schedule in micro-batches, `PUBLISHED_MICRO_BATCHES` per
    update, and moved along it once per update: with its warm-up of a tenth the rate rises from 0 to 0.62 of the peak
    and never falls.
    """
    if schedule == "published":
        return peak * min(1.0, update / max(1.0, warmup * updates * PUBLISHED_MICRO_BATCHES))
    rising = _warmup_updates(updates, warmup)
    if update < rising:
        return peak * (update + 1) / rising
    return peak * (updates - update) / max(1, updates - rising)


def rate_falls(update: int, updates: int, warmup: float, schedule: Schedule) -> bool:
    """Whether the learning rate falls after this many updates; the published one never does."""
    return schedule == "linear" and update >= _warmup_updates(updates, warmup)


def _warmup_updates(updates: int, warmup: float) -> int:
    return max(1, round(updates * warmup))


def default_learning_rate(hidden_size: int) -> float:
    """Peak learning rate for an encoder of this width: 2e-5 at RoBERTa-large's 1024, growing as it gets narrower."""
    return 2e-5 * (1024 / hidden_size) ** 2


def update(
    scorer: Scorer,
    strategy: Strategy,
    corpus: Corpus,
    batch: Sequence[Draw],
    config: TrainingSettings,
    state: State,
    *,
    rate: float,
    ranks: Ranks,
) -> float:
    """One step of the optimizer; the mean loss over the instances of the whole batch.

    Halves `state.budget` and does the passes again where memory runs out. DivergedError where the loss or the gradient
    is not a number or the loss explodes: what is in memory is then not worth keeping.
    """
    scorer.model.train()
    while True:
        try:
            loss = _compute_gradients(scorer, strategy, corpus, batch, config, state, ranks)
            break
        except PassMemoryError:
            _halve_budget(state, batch)
    if not loss < (max(MIN_EXPLODED_LOSS, EXPLOSION_RATIO * state.running_loss) if state.update else math.inf):
        raise DivergedError(f"the loss is {loss:.4g}")
    norm = strategy.step(rate)
    if not norm < math.inf:
        raise DivergedError(f"the gradient's norm is {norm:.4g}")
    return loss


def _compute_gradients(
    scorer: Scorer,
    strategy: Strategy,
    corpus: Corpus,
    batch: Sequence[Draw],
    config: TrainingSettings,
    state: State,
    ranks: Ranks,
) -> float:
    """Leaves this rank's share of the gradients; the loss of the whole batch, or MemoryShortError on all ranks.

    Passes are cut from the whole batch and seeded by their number, then shared out: as long as there are as many as
    ranks, any number of ranks computes the same ones, dropout included.
    """
    micros = micro_batches(batch, state.budget, ranks.count)
    mine = assign_passes([padded_tokens(micro) for micro in micros], ranks.rank, ranks.count)
    weights = [1.0] * len(mine)
    if strategy.lockstep:
        most = max(len(assign_passes([padded_tokens(m) for m in micros], rank, ranks.count)) for rank in range(ranks.count))
        # A rank with fewer passes does one again without weight: its gradient is zero, but the others do not wait.
        weights += [0.0] * (most - len(mine))
        mine += [mine[0] if mine else 0] * (most - len(mine))
    strategy.zero_grad()
    total, short = 0.0, 0.0
    try:
        for done, (number, weight) in enumerate(zip(mine, weights, strict=True), start=1):
            torch.manual_seed(_pass_seed(config.seed, state.update, number))
            loss = _run_pass(scorer, corpus, micros[number], config) * (weight / len(batch))
            strategy.backward(loss, last=done == len(mine))
            total += loss.item()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if strategy.lockstep:
            remedy = "give a smaller --batch-tokens and run the same command again"
            raise TrainingError(f"memory ran out at {state.budget} tokens per pass; {remedy}") from error
        short = 1.0
    total, short = ranks.all_reduce([total, short])
    if short:
        strategy.zero_grad()
        raise PassMemoryError
    return total


def _run_pass(scorer: Scorer, corpus: Corpus, micro: Sequence[Draw], config: TrainingSettings) -> Tensor:
    """The sum of the instances' losses."""
    logits = scorer.logits([pair for drawn in micro for pair in corpus.pairs(drawn.index, drawn.chosen)])
    labels = [label for drawn in micro for label in corpus.labels(drawn.index, drawn.chosen)]
    numbers = [number for number, drawn in enumerate(micro) for _ in drawn.chosen]
    compared = [flag for drawn in micro for flag in comparison_mask(drawn.chosen, corpus.selectable(drawn.index))]
    pairs = Pairs(
        logits=logits,
        labels=torch.tensor(labels, device=logits.device),
        groups=torch.tensor(numbers, device=logits.device),
        count=len(micro),
        compared=torch.tensor(compared, device=logits.device),
        weights=_pair_weights(corpus, micro, config, logits.device) if config.weights else None,
    )
    return instance_losses(pairs, scorer.head, config).sum()


def _pair_weights(corpus: Corpus, micro: Sequence[Draw], config: TrainingSettings, device: torch.device) -> Tensor:
    """The weight of every pair by its source, (pairs,)."""
    by_source = config.source_weights
    sources = (source for drawn in micro for source in corpus.sources(drawn.index, drawn.chosen))
    return torch.tensor([by_source[source] for source in sources], device=device)


def _pass_seed(seed: int, update: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed} {update} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out; torch on a CPU, and JAX, say so by a plain RuntimeError."""
    said = str(error)
    short = "allocate memory" in said or said.startswith("RESOURCE_EXHAUSTED")
    return short or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _halve_budget(state: State, batch: Sequence[Draw]) -> None:
    largest = max(drawn.tokens for drawn in batch)
    if state.budget // 2 < max(drawn.width for drawn in batch):
        remedy = "give a smaller --max-candidates, or pretrain with a smaller --max-length"
        raise TrainingError(f"memory ran out for one instance of {largest} padded tokens; {remedy}")
    state.budget //= 2
    state.events.append(f"update {state.update + 1}: memory ran out; on with {state.budget} tokens per pass")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
