"""Runs one update: sets its learning rate, and computes its gradients in as many passes as memory requires."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cappy.errors import TrainingError
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import TrainingState
from cappy.training.corpus import Corpus
from cappy.training.distributed import Strategy, World
from cappy.training.feed import DrawnInstance, assign_passes, comparison_mask, padded_tokens, split_batch
from cappy.training.losses import Pairs, instance_losses
from cappy.training.settings import Schedule, TrainingSettings

PUBLISHED_MICRO_BATCHES = 16
"""Micro-batches of an update in the published finetuning."""
EXPLOSION_RATIO = 100.0
"""A loss above this multiple of its running mean, and above `MIN_EXPLODED_LOSS`, counts as diverged."""
MIN_EXPLODED_LOSS = 10.0
"""Labels are 0 to 1, so losses are usually a few units at most."""


class DivergedError(Exception):
    """The loss exploded, or the loss or the gradient is not finite; the message says which."""


class PassMemoryError(Exception):
    """A pass ran out of memory on some rank."""


def learning_rate(update_index: int, updates: int, peak: float, warmup: float, schedule: Schedule = "linear") -> float:
    """The learning rate of an update (from 0): linear warm-up over the share `warmup`, then linear decay to zero.

    The schedule "published" reproduces the published code, which sized its warm-up in micro-batches,
    `PUBLISHED_MICRO_BATCHES` per update, but stepped it once per update: with a warm-up of 0.1 the rate rises from 0 to
    0.62 of the peak and never falls.
    """
    if schedule == "published":
        return peak * min(1.0, update_index / max(1.0, warmup * updates * PUBLISHED_MICRO_BATCHES))
    warmup_updates = _warmup_updates(updates, warmup)
    if update_index < warmup_updates:
        return peak * (update_index + 1) / warmup_updates
    return peak * (updates - update_index) / max(1, updates - warmup_updates)


def rate_falls(num_done: int, updates: int, warmup: float, schedule: Schedule) -> bool:
    """Whether the learning rate decays after `num_done` updates; the published schedule never does."""
    return schedule == "linear" and num_done >= _warmup_updates(updates, warmup)


def _warmup_updates(updates: int, warmup: float) -> int:
    return max(1, round(updates * warmup))


def default_learning_rate(hidden_size: int) -> float:
    """Peak learning rate for an encoder of this width: 2e-5 at 1024 (RoBERTa-large), scaled by (1024 / width)²."""
    return 2e-5 * (1024 / hidden_size) ** 2


def run_update(
    scorer: Scorer,
    strategy: Strategy,
    corpus: Corpus,
    batch: Sequence[DrawnInstance],
    config: TrainingSettings,
    state: TrainingState,
    *,
    rate: float,
    world: World,
) -> float:
    """Runs one optimizer step and returns the mean loss over the instances of the whole batch.

    If memory runs out, halves `state.budget` and repeats the passes; raises TrainingError if that is not possible.
    Raises DivergedError if the loss or the gradient is not finite, or the loss explodes; the weights in memory must
    then be discarded.
    """
    scorer.model.train()
    while True:
        try:
            loss = _compute_gradients(scorer, strategy, corpus, batch, config, state, world)
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
    batch: Sequence[DrawnInstance],
    config: TrainingSettings,
    state: TrainingState,
    world: World,
) -> float:
    """Accumulates this rank's gradients; returns the loss of the whole batch, or raises PassMemoryError on all ranks.

    The batch is split into passes, which are seeded by their index and then assigned to ranks. So any number of ranks
    computes the same passes with the same dropout, as long as there are at least as many passes as ranks.
    """
    passes = split_batch(batch, state.budget, world.size)
    own_passes = assign_passes([padded_tokens(draws) for draws in passes], world.rank, world.size)
    weights = [1.0] * len(own_passes)
    if strategy.lockstep:
        max_passes = max(
            len(assign_passes([padded_tokens(draws) for draws in passes], rank, world.size))
            for rank in range(world.size)
        )
        # A rank with fewer passes repeats one with weight 0, because all ranks must run the same number.
        weights += [0.0] * (max_passes - len(own_passes))
        own_passes += [own_passes[0] if own_passes else 0] * (max_passes - len(own_passes))
    strategy.zero_grad()
    total_loss, out_of_memory = 0.0, 0.0
    try:
        for number, (index, weight) in enumerate(zip(own_passes, weights, strict=True), start=1):
            torch.manual_seed(_pass_seed(config.seed, state.update, index))
            loss = _run_pass(scorer, corpus, passes[index], config) * (weight / len(batch))
            strategy.backward(loss, last=number == len(own_passes))
            total_loss += loss.item()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if strategy.lockstep:
            remedy = "give a smaller --batch-tokens and run the same command again"
            raise TrainingError(f"memory ran out at {state.budget} tokens per pass; {remedy}") from error
        out_of_memory = 1.0
    total_loss, out_of_memory = world.all_reduce([total_loss, out_of_memory])
    if out_of_memory:
        strategy.zero_grad()
        raise PassMemoryError
    return total_loss


def _run_pass(scorer: Scorer, corpus: Corpus, micro_batch: Sequence[DrawnInstance], config: TrainingSettings) -> Tensor:
    """Runs one forward pass; returns the sum of its instances' losses."""
    logits = scorer.training_logits([pair for draw in micro_batch for pair in corpus.pairs(draw.index, draw.responses)])
    labels = [label for draw in micro_batch for label in corpus.labels(draw.index, draw.responses)]
    instance_of_pair = [index for index, draw in enumerate(micro_batch) for _ in draw.responses]
    compared = [flag for draw in micro_batch for flag in comparison_mask(draw.responses, corpus.selectable(draw.index))]
    pairs = Pairs(
        logits=logits,
        labels=torch.tensor(labels, device=logits.device),
        groups=torch.tensor(instance_of_pair, device=logits.device),
        count=len(micro_batch),
        compared=torch.tensor(compared, device=logits.device),
        weights=_pair_weights(corpus, micro_batch, config, logits.device) if config.weights else None,
    )
    return instance_losses(pairs, scorer.head, config).sum()


def _pair_weights(
    corpus: Corpus, micro_batch: Sequence[DrawnInstance], config: TrainingSettings, device: torch.device
) -> Tensor:
    """The weight of each pair by the source of its response, (pairs,)."""
    source_weights = config.source_weights
    sources = (source for draw in micro_batch for source in corpus.sources(draw.index, draw.responses))
    return torch.tensor([source_weights[source] for source in sources], device=device)


def _pass_seed(seed: int, update_index: int, pass_index: int) -> int:
    digest = hashlib.blake2b(f"{seed} {update_index} {pass_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out; torch on a CPU, and JAX, raise a plain RuntimeError for that."""
    message = str(error)
    out_of_memory = "allocate memory" in message or message.startswith("RESOURCE_EXHAUSTED")
    return out_of_memory or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _halve_budget(state: TrainingState, batch: Sequence[DrawnInstance]) -> None:
    largest = max(draw.tokens for draw in batch)
    if state.budget // 2 < max(draw.width for draw in batch):
        remedy = "give a smaller --max-candidates, or pretrain with a smaller --max-length"
        raise TrainingError(f"memory ran out for one instance of {largest} padded tokens; {remedy}")
    state.budget //= 2
    state.events.append(f"update {state.update + 1}: memory ran out; continued with {state.budget} tokens per pass")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
