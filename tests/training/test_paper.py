"""The published run: its settings, its rows, its schedule with the bug."""

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cappy.config import build
from cappy.errors import ConfigError
from cappy.records import Instance, write
from cappy.scoring import Scorer
from cappy.training.corpus import Corpus
from cappy.training.feed import batch, updates_of
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.paper import resolved
from cappy.training.plan import Unit, rate
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining
from cappy.training.tokenization import open_corpora

Plan = Callable[..., FinetuningConfig]


def read_corpus(scorer_folder: Path, source: Path, cache: Path, unit: Unit) -> Corpus:
    scorer = Scorer.load(str(scorer_folder), precision="fp32")
    return open_corpora(source, cache, scorer.tokenizer, scorer.encoder, metric="rougeL", sources=(), unit=unit).train


def untouched(like: FinetuningConfig, **values: object) -> FinetuningConfig:
    """Settings at their defaults, but for these."""
    return build(FinetuningConfig, {"source": like.source, "target": like.target, "work": like.work, **values})


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
    found = resolved(untouched(plan(), preset="paper"))
    assert (found.unit, found.batch_instances, found.train_rows) == ("row", 128, 102_400)
    assert (found.learning_rate, found.schedule, found.warmup) == (2e-5, "published", 0.1)
    assert (found.relative, found.listwise, found.weight_decay, found.clip) == (0.0, 0.0, 0.0, 0.0)
    assert found.keep == "last"
    assert resolved(plan(preset="paper", train_rows=640, clip=0.5)).train_rows == 640
    assert resolved(plan(preset="paper", clip=0.5)).clip == 0.5
    assert resolved(found) == found
    assert resolved(plan()) == plan()
    assert resolved(untouched(plan(), preset="paper", epochs=2.0)).train_rows is None
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


def test_a_run_takes_as_many_rows_as_asked_for_and_keeps_the_last_weights(
    plan: Plan, corpus: Corpus, make_scorer: Callable[..., Path]
) -> None:
    folder = make_scorer(head="mse")
    given = {"train_rows": 480, "batch_instances": 48, "learning_rate": 1e-2, "batch_tokens": 256}
    settings = untouched(plan(), preset="paper", scorer=str(folder), **given)
    manifest = run(settings)
    log = json.loads((settings.target / "training.json").read_text())
    assert manifest.metrics["updates"] == manifest.metrics["best_update"] == 10
    assert Scorer.load(str(folder)).encoder.truncation == "middle"
    assert Scorer.load(str(settings.target)).encoder.truncation == "longest_first", "it is scored as it was trained"
    assert [point["rate"] for point in log["curve"]] == [rate(u, 10, 1e-2, 0.1, "published") for u in range(10)]
    whole = plan(train_rows=480, batch_instances=8)
    assert updates_of(corpus, whole) == 480 / (8 * 4), "the copy task has four candidates per instance"


def test_an_epoch_draws_as_many_responses_as_there_are(
    scorer_folder: Path, tmp_path: Path, plan: Plan, instances: list[Instance]
) -> None:
    """Ten instances of 50 responses and ten of 5, of which 8 and 5 are drawn at a time: 550 / (8 x 6.5) updates."""
    first = instances[0].candidates[0]
    folder = tmp_path / "uneven"
    made = []
    for number, one in enumerate(instances[:20]):
        many = tuple(replace(first, response=f"cat {place}") for place in range(50 if number % 2 else 5))
        made.append(replace(one, split="train", candidates=many))
    write(folder, made)
    uneven = read_corpus(scorer_folder, folder, tmp_path / "cache", "instance")
    assert updates_of(uneven, plan(epochs=1.0, max_candidates=8, batch_instances=8)) == math.ceil(550 / (8 * 6.5))
    assert updates_of(uneven, plan(epochs=4.0, max_candidates=8, batch_instances=8)) == math.ceil(2200 / (8 * 6.5))
    assert updates_of(uneven, plan(train_rows=52, max_candidates=8, batch_instances=8)) == 1


def test_pretraining_follows_the_preset_too(plan: Plan, tmp_path: Path, scorer_folder: Path) -> None:
    given = {"source": plan().source, "target": tmp_path / "made", "work": tmp_path / "work", "preset": "paper"}
    sizes = {
        "train_rows": 240,
        "batch_instances": 80,
        "max_length": 64,
        "batch_tokens": 256,
        "encoder": str(scorer_folder),
    }
    pretraining(build(PretrainingConfig, {**given, **sizes}))
    made = Scorer.load(str(tmp_path / "made"))
    assert (made.head, made.encoder.truncation) == ("mse", "longest_first")
    assert len(json.loads((tmp_path / "made" / "training.json").read_text())["curve"]) == 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"preset": "paper"},
            "--preset paper: trains a raw regression, this scorer's head is bce; start from a scorer",
        ),
        ({"schedule": "published", "train_rows": 4}, "--schedule published: begins at rate 0, and this is one update"),
        ({"unit": "row", "weights": ("llm=0.5",)}, "--weights: weigh responses of one instance, a row has one; give"),
    ],
)
def test_what_would_train_nothing_or_otherwise_than_told_is_one_line(
    values: dict[str, object], said: str, plan: Plan, make_scorer: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        run(plan(scorer=str(make_scorer(head="bce")), **values))
