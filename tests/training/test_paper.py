"""The published run: its settings, its rows, its schedule with the bug."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy.scoring import Scorer
from cappy.training.corpus import Corpus
from cappy.training.feed import batch
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.loop import updates_of
from cappy.training.paper import resolved
from cappy.training.plan import Unit, rate
from cappy.training.pretraining import PretrainingConfig
from cappy.training.tokenization import open_corpora

Plan = Callable[..., FinetuningConfig]


def read_corpus(scorer_folder: Path, source: Path, cache: Path, unit: Unit) -> Corpus:
    scorer = Scorer.load(str(scorer_folder), precision="fp32")
    return open_corpora(source, cache, scorer.tokenizer, scorer.encoder, metric="rougeL", sources=(), unit=unit).train


@pytest.fixture
def corpus(scorer_folder: Path, source: Path, tmp_path: Path) -> Corpus:
    return read_corpus(scorer_folder, source, tmp_path / "cache", "instance")


@pytest.fixture
def rows(scorer_folder: Path, source: Path, tmp_path: Path) -> Corpus:
    return read_corpus(scorer_folder, source, tmp_path / "cache", "row")


def test_the_published_schedule_rises_from_0_to_0_62_of_the_peak_and_never_falls() -> None:
    """800 updates of 16 micro-batches at a nominal 2e-5: the code reached 1.248e-5 (method.md, 4)."""
    rates = [rate(update, 800, 2e-5, 0.1, "published") for update in range(800)]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(1.248e-5, rel=1e-3)
    assert all(later > earlier for earlier, later in itertools.pairwise(rates))


def test_the_preset_is_the_published_run_but_for_what_flags_say(plan: Plan) -> None:
    found = resolved(plan(preset="paper", learning_rate=None, batch_instances=8))
    assert (found.unit, found.batch_instances, found.train_rows) == ("row", 128, 102_400)
    assert (found.learning_rate, found.schedule, found.warmup) == (2e-5, "published", 0.1)
    assert (found.relative, found.listwise, found.weight_decay, found.clip) == (0.0, 0.0, 0.0, 0.0)
    assert found.keep == "last"
    assert resolved(plan(preset="paper", train_rows=640, clip=0.5)).train_rows == 640
    assert resolved(plan(preset="paper", clip=0.5)).clip == 0.5
    assert resolved(found) == found
    assert resolved(plan()) == plan()
    pretraining = resolved(PretrainingConfig(source=plan().source, target=plan().target, preset="paper"))
    assert pretraining.head == "mse"


def test_rows_are_drawn_one_by_one_and_each_pass_holds_each_once(rows: Corpus, corpus: Corpus) -> None:
    assert len(rows) == rows.facts.pairs == corpus.facts.pairs
    size = 16
    assert len(rows) % size == 0
    drawn = [one for update in range(len(rows) // size) for one in batch(rows, update, size, 16, seed=0)]
    assert sorted(one.index for one in drawn) == list(range(len(rows)))
    names = [rows.name(one.index) for one in drawn[:size]]
    assert len(set(names)) > size / 2, "rows of one instance do not stand together"


def test_a_run_takes_as_many_rows_as_asked_for_and_keeps_the_last_weights(plan: Plan, corpus: Corpus) -> None:
    settings = plan(preset="paper", train_rows=480, batch_instances=48, learning_rate=1e-2, checks=5)
    manifest = run(settings)
    log = json.loads((settings.target / "training.json").read_text())
    assert manifest.metrics["updates"] == manifest.metrics["best_update"] == 10
    assert [point["rate"] for point in log["curve"]] == [rate(u, 10, 1e-2, 0.1, "published") for u in range(10)]
    whole = plan(train_rows=480, batch_instances=8)
    assert updates_of(whole, corpus) == 480 / (8 * 4), "the copy task has four candidates per instance"
