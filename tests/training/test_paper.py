"""The published run: its settings, its rows, its schedule with the bug."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from wording import raises_naming

from cappy.cli.steps import make_step_command
from cappy.config import build, to_values
from cappy.errors import ConfigError
from cappy.records import Instance, Manifest, write
from cappy.scoring import Scorer
from cappy.training.corpus import Corpus, open_corpora
from cappy.training.feed import count_updates, draw_batch
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining
from cappy.training.settings import Unit
from cappy.training.update import learning_rate

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
    rates = [learning_rate(update, 800, 2e-5, 0.1, "published") for update in range(800)]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(1.248e-5, rel=1e-3)
    assert all(later > earlier for earlier, later in itertools.pairwise(rates))


def test_the_preset_is_the_published_run_but_for_what_flags_say(plan: Plan) -> None:
    result = untouched(plan(), preset="paper")
    assert (result.unit, result.batch_instances, result.train_rows) == ("row", 128, 102_400)
    assert (result.learning_rate, result.schedule, result.warmup) == (2e-5, "published", 0.1)
    assert (result.relative, result.listwise, result.weight_decay, result.clip) == (0.0, 0.0, 0.0, 0.0)
    assert result.keep == "last"
    assert untouched(plan(), preset="paper", train_rows=640, clip=0.5).train_rows == 640
    assert untouched(plan(), preset="paper", clip=0.5).clip == 0.5
    assert untouched(plan(), preset="paper", epochs=2.0).train_rows is None
    pretraining = PretrainingConfig(source=plan().source, target=plan().target, preset="paper")
    assert (pretraining.head, pretraining.max_length) == ("mse", 512)


@pytest.mark.parametrize("name", ["weight_decay", "clip", "batch_instances", "keep", "schedule", "warmup", "epochs"])
def test_a_setting_that_is_given_wins_over_the_preset_also_at_its_default(plan: Plan, name: str) -> None:
    default = FinetuningConfig.__dataclass_fields__[name].default
    result = untouched(plan(), preset="paper", **{name: default})
    assert getattr(result, name) == default
    assert result.train_rows == (None if name == "epochs" else 102_400)
    again = build(FinetuningConfig, to_values(result))
    assert again == result, "a run that is started anew from its settings is the same"
    assert replace(result, seed=3).train_rows == result.train_rows


def test_a_flag_that_nobody_gave_leaves_the_preset_alone(plan: Plan, tmp_path: Path) -> None:
    asked: list[FinetuningConfig] = []

    def record(config: FinetuningConfig, progress: object) -> Manifest:
        asked.append(config)
        return Manifest(step="finetuning", files=())

    command = make_step_command("finetuning", "Train.", FinetuningConfig, record)
    words = ["--source", "a", "--target", "b", "--preset", "paper", "--weight-decay", "0.01"]
    command(words, standalone_mode=False)
    (result,) = asked
    assert (result.weight_decay, result.clip, result.batch_instances, result.train_rows) == (0.01, 0.0, 128, 102_400)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"train_rows": 64, "epochs": 2.0}, ("--epochs:", "--train-rows")),
        ({"keep": "last", "patience": 8}, ("--patience:", "--keep last")),
        ({"schedule": "published", "patience": 8}, ("--patience:", "--schedule published")),
        ({"preset": "paper", "patience": 8}, ("--patience:", "--keep last")),
        ({"unit": "row", "max_candidates": 4}, ("--max-candidates:", "--unit row")),
        ({"unit": "row", "relative": 1.0}, ("--relative:", "--unit row")),
        ({"unit": "row", "listwise": 2.0}, ("--listwise:", "--unit row")),
        ({"zero_stage": 2}, ("--zero-stage:", "--parallelism deepspeed")),
        ({"image": "mine"}, ("--image:", "--launcher trainjob or customjob")),
        ({"customjob": {"spot": True}}, ("--customjob.spot:", "--launcher customjob")),
        ({"sources": ("llm",), "weights": ("mismatch=0.2",)}, ("--weights:", "mismatch", "--sources")),
    ],
)
def test_a_setting_without_an_effect_beside_the_others_is_refused(
    plan: Plan, values: dict[str, object], names: tuple[str, ...]
) -> None:
    with raises_naming(ConfigError, *names, "leave") as caught:
        untouched(plan(), **values)
    assert str(caught.value).startswith(names[0])


@pytest.mark.parametrize("name", ["layers", "hidden_size"])
def test_the_shape_of_an_encoder_that_is_there_cannot_be_chosen(plan: Plan, name: str) -> None:
    given = {"source": plan().source, "target": plan().target, name: 64}
    assert getattr(build(PretrainingConfig, given), name) == 64
    with raises_naming(ConfigError, f"--{name.replace('_', '-')}:", "--encoder builtin"):
        build(PretrainingConfig, {**given, "encoder": "mine"})


def test_rows_are_drawn_one_by_one_and_each_pass_holds_each_once(rows: Corpus, corpus: Corpus) -> None:
    assert len(rows) == rows.facts.pairs == corpus.facts.pairs
    size = 16
    assert len(rows) % size == 0
    drawn = [one for update in range(len(rows) // size) for one in draw_batch(rows, update, size, 16, seed=0)]
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
    assert [point["rate"] for point in log["curve"]] == [
        learning_rate(u, 10, 1e-2, 0.1, "published") for u in range(10)
    ]
    whole = untouched(plan(), train_rows=480, batch_instances=8)
    assert count_updates(corpus, whole) == 480 / (8 * 4), "the copy task has four candidates per instance"


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
    assert count_updates(uneven, plan(epochs=1.0, max_candidates=8, batch_instances=8)) == math.ceil(550 / (8 * 6.5))
    assert count_updates(uneven, plan(epochs=4.0, max_candidates=8, batch_instances=8)) == math.ceil(2200 / (8 * 6.5))
    assert count_updates(uneven, untouched(plan(), train_rows=52, max_candidates=8, batch_instances=8)) == 1


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
    ("values", "names"),
    [
        ({"preset": "paper"}, ("--preset paper:", "head is bce", "--head mse")),
        ({"schedule": "published", "epochs": 0.01}, ("--schedule published:", "rate 0", "--train-rows")),
        ({"unit": "row", "weights": ("llm=0.5",)}, ("--weights:", "--unit instance")),
    ],
)
def test_what_would_train_nothing_or_otherwise_than_reported_is_one_line(
    values: dict[str, object], names: tuple[str, ...], plan: Plan, make_scorer: Callable[..., Path]
) -> None:
    with raises_naming(ConfigError, *names) as caught:
        run(plan(scorer=str(make_scorer(head="bce")), **values))
    assert "\n" not in str(caught.value)
