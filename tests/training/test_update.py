"""An update's gradients are those of its instances, however these are cut into passes and shared out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wording import raises_naming

from cappy.errors import ConfigError
from cappy.records import Candidate, Instance, write
from cappy.scoring import Scorer
from cappy.training.checkpoint import TrainingState
from cappy.training.corpus import Corpus, open_corpora
from cappy.training.distributed import SINGLE_RANK, ReplicatedStrategy, World
from cappy.training.feed import DrawnInstance, assign_passes, draw_batch, padded_tokens, split_batch
from cappy.training.finetuning import FinetuningConfig
from cappy.training.loop import check_trainable
from cappy.training.losses import LossSettings, Pairs, instance_losses
from cappy.training.update import run_update

Plan = Callable[..., FinetuningConfig]


class Still(ReplicatedStrategy):
    """Replicas that keep the gradients and step nowhere."""

    def step(self, rate: float) -> float:
        return 1.0


@pytest.fixture(scope="module")
def scorer(scorer_folder: Path) -> Scorer:
    """Without dropout, whose masks differ from pass to pass."""
    scorer = Scorer.load(str(scorer_folder), precision="fp32")
    for module in scorer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in scorer.model.roberta.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    return scorer


@pytest.fixture(scope="module")
def corpus(scorer: Scorer, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    cache = tmp_path_factory.mktemp("cache")
    return open_corpora(source, cache, scorer.tokenizer, scorer.encoder, metric="rougeL", sources=()).train


def gradients(scorer: Scorer, corpus: Corpus, plan: FinetuningConfig, budget: int, size: int = 13) -> torch.Tensor:
    strategy = Still(scorer.model, plan, SINGLE_RANK)
    drawn = draw_batch(corpus, 2, size, plan.max_candidates, seed=0)
    run_update(scorer, strategy, corpus, drawn, plan, TrainingState(budget=budget), rate=0.0, world=SINGLE_RANK)
    return torch.cat([p.grad.reshape(-1) for p in scorer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("budget", [64, 300, 600])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(
    budget: int, scorer: Scorer, corpus: Corpus, plan: Plan
) -> None:
    settings = plan(listwise=0.5)
    whole = gradients(scorer, corpus, settings, 100_000)
    assert len(split_batch(draw_batch(corpus, 2, 13, 16, seed=0), budget)) > 1
    assert (gradients(scorer, corpus, settings, budget) - whole).abs().max() < 1e-6 * max(1.0, float(whole.abs().max()))


def loss_of(scorer: Scorer, corpus: Corpus, drawn: DrawnInstance, compared: list[bool] | None = None) -> torch.Tensor:
    """The loss of one instance by itself, (1,)."""
    pairs = Pairs(
        logits=scorer.training_logits(corpus.pairs(drawn.index, drawn.responses)),
        labels=torch.tensor(corpus.labels(drawn.index, drawn.responses)),
        groups=torch.zeros(len(drawn.responses), dtype=torch.long),
        count=1,
        compared=None if compared is None else torch.tensor(compared),
    )
    return instance_losses(pairs, scorer.head, LossSettings(listwise=1.0))


def test_gradients_are_those_of_the_mean_over_instances(scorer: Scorer, corpus: Corpus, plan: Plan) -> None:
    settings = plan()
    result = gradients(scorer, corpus, settings, 300)
    scorer.model.zero_grad()
    losses = [loss_of(scorer, corpus, drawn) for drawn in draw_batch(corpus, 2, 13, 16, seed=0)]
    torch.cat(losses).mean().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in scorer.model.parameters() if p.grad is not None])
    assert (result - expected).abs().max() < 1e-6 * max(1.0, float(expected.abs().max()))


def test_the_shares_of_the_ranks_add_up_to_the_whole(scorer: Scorer, corpus: Corpus, plan: Plan) -> None:
    drawn = draw_batch(corpus, 2, 13, 16, seed=0)
    whole = split_batch(drawn, 300, 1)
    assert len(whole) >= 3, "so that any number of ranks up to three computes the same passes"
    for count in (1, 2, 3):
        assert split_batch(drawn, 300, count) == whole
        shares = [assign_passes([padded_tokens(micro) for micro in whole], rank, count) for rank in range(count)]
        assert sorted(number for share in shares for number in share) == list(range(len(whole)))


def test_weights_by_source_reach_the_loss(scorer: Scorer, corpus: Corpus, plan: Plan) -> None:
    """All responses of the task are from an LLM: one weight for all changes nothing, without them nothing is left."""
    settings = {"listwise": 0.0}
    plain = gradients(scorer, corpus, plan(**settings), 300)
    assert (gradients(scorer, corpus, plan(weights=("llm=3",), **settings), 300) - plain).abs().max() < 1e-6
    assert gradients(scorer, corpus, plan(weights=("llm=0", "mismatch=1"), **settings), 300).abs().max() == 0


@pytest.mark.parametrize("text", ["llm", "human=1", "llm=-1", "llm=much"])
def test_a_weight_that_is_none_is_refused_in_one_line(text: str, plan: Plan) -> None:
    with raises_naming(ConfigError, f"--weights: '{text}'", "mismatch=0.2"):
        plan(weights=(text,))


def test_a_source_that_is_weighed_twice_is_refused_instead_of_the_last_weight_winning(plan: Plan) -> None:
    with raises_naming(ConfigError, "--weights:", "mismatch", "twice"):
        plan(weights=("mismatch=0.2", "llm=1", "mismatch=0.5"))


def test_fewer_instances_than_ranks_are_refused_in_one_line(corpus: Corpus, plan: Plan) -> None:
    with raises_naming(ConfigError, f"{len(corpus)} instances", "100 ranks", "--devices", "--nodes"):
        check_trainable(corpus, plan(batch_instances=100), World(size=100))
    check_trainable(corpus, plan(batch_instances=100), World(size=len(corpus)))
    with raises_naming(ConfigError, "--batch-instances 2:", "3 ranks", "--batch-instances 3"):
        check_trainable(corpus, plan(batch_instances=2), World(size=3))


def test_a_mismatch_takes_no_part_in_the_comparisons_of_an_update(
    scorer: Scorer, instances: list[Instance], plan: Plan, tmp_path: Path
) -> None:
    planted = Candidate(response="cat dog", source="mismatch", labels={"rougeL": 0.0})
    write(tmp_path / "mixed", [replace(one, candidates=(*one.candidates[:3], planted)) for one in instances])
    mixed = open_corpora(
        tmp_path / "mixed", tmp_path / "cache", scorer.tokenizer, scorer.encoder, metric="rougeL", sources=()
    ).train
    result = gradients(scorer, mixed, plan(), 100_000, size=1)
    (drawn,) = draw_batch(mixed, 2, 1, 16, seed=0)
    expected = []
    for compared in ([True, True, True, False], [True] * 4):
        scorer.model.zero_grad()
        loss_of(scorer, mixed, drawn, compared).sum().backward()
        expected.append(torch.cat([p.grad.reshape(-1) for p in scorer.model.parameters() if p.grad is not None]))
    assert (result - expected[0]).abs().max() < 1e-5 * max(1.0, float(expected[0].abs().max()))
    assert (result - expected[1]).abs().max() > 1e-3 * float(expected[1].abs().max())
