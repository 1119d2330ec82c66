"""The whole loop: it does what torch's does, resumes exactly, keeps the best, stops early, compiles few programs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import torch
from cases import copy_groups, plan, without_dropout

from cappy.errors import ConfigError
from cappy.progress import silent
from cappy.scoring import Scorer
from cappy.training import loop as torch_loop
from cappy.training import tpu
from cappy.training.feed import pools_to_check
from cappy.training.loop import mean_pick
from cappy.training.tpu import loop
from cappy.training.tpu.engine import Engine
from cappy.training.tpu.loop import Outcome, fit, new_engine, new_exam, shapes_of

TRAIN, VALIDATION = copy_groups(40, longest=5), copy_groups(12, longest=5, seed=1)
GIVEN = {"batch_tokens": 2048, "epochs": 1.6, "checks": 4, "learning_rate": 1e-3, "checkpoint_seconds": 0.0}
UPDATES = 8


@pytest.fixture
def scorer(bert_folder: Path) -> Scorer:
    return Scorer.load(str(bert_folder), device="cpu")


@pytest.fixture
def again(bert_folder: Path) -> Callable[[], Scorer]:
    return lambda: Scorer.load(str(bert_folder), device="cpu")


class KilledError(Exception):
    """Stands for a kill at some update."""


def killed_after(last: int) -> Callable[..., None]:
    def progress(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        if done == last:
            raise KilledError

    return progress


def run(
    scorer: Scorer, folder: Path, progress: Callable[..., None] = silent, count: int = 8, **values: object
) -> Outcome:
    settings = plan(**{**GIVEN, **values})
    return fit(
        scorer, TRAIN, VALIDATION, settings, checkpoints=folder, progress=progress, devices=jax.devices()[:count]
    )


def weights(scorer: Scorer) -> dict[str, torch.Tensor]:
    return dict(scorer.model.state_dict())


def test_without_dropout_a_run_is_torchs_run(again: Callable[[], Scorer], tmp_path: Path) -> None:
    ours, theirs = without_dropout(again()), without_dropout(again())
    outcome = run(ours, tmp_path / "jax", count=1)
    settings = plan(**GIVEN)
    expected = torch_loop.fit(theirs, TRAIN, VALIDATION, settings, checkpoints=tmp_path / "torch", progress=silent)
    assert (outcome.updates, outcome.best_update) == (expected.updates, expected.best_update)
    assert [entry["update"] for entry in outcome.log] == [0, 2, 4, 6, 8]
    for entry, other in zip(outcome.log, expected.log, strict=True):
        assert entry == pytest.approx(other, abs=1e-3)
    pairs = [(group.instruction, response) for group in VALIDATION for response in group.responses]
    assert ours.score(pairs) == pytest.approx(theirs.score(pairs), abs=1e-3)


def test_a_killed_run_continues_and_ends_with_the_same_weights(again: Callable[[], Scorer], tmp_path: Path) -> None:
    unbroken, broken = again(), again()
    whole = run(unbroken, tmp_path / "a")
    with pytest.raises(KilledError):
        run(again(), tmp_path / "b", killed_after(5))
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    # A kill while a checkpoint is written leaves a part of it under a temporary name.
    (tmp_path / "b.tmp").mkdir()
    (tmp_path / "b.tmp" / "model.safetensors").write_bytes(b"half")
    seen: list[int] = []

    def remember(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        seen.append(done)

    assert run(broken, tmp_path / "b", remember) == whole
    assert seen[0] == 6, "updates before the checkpoint are not done again"
    assert all(torch.equal(tensor, weights(broken)[name]) for name, tensor in weights(unbroken).items())

    elsewhere = again()
    other = run(elsewhere, tmp_path / "c", count=1)
    assert other.log[-1] == pytest.approx(whole.log[-1], abs=1e-4)
    pairs = [(group.instruction, response) for group in VALIDATION for response in group.responses]
    assert elsewhere.score(pairs) == pytest.approx(unbroken.score(pairs), abs=1e-4)


def test_it_learns_keeps_the_best_and_stops_when_nothing_gets_better(scorer: Scorer, tmp_path: Path) -> None:
    outcome = run(scorer, tmp_path, count=1, epochs=24.0, checks=24, patience=3)
    assert outcome.log[-1]["loss"] < outcome.log[1]["loss"]
    assert outcome.best_pick == pytest.approx(max(entry["pick"] for entry in outcome.log), abs=1e-6)
    assert outcome.updates < 120
    assert outcome.updates - outcome.best_update == 3 * 5
    pools = pools_to_check(VALIDATION, 6, 0)
    assert mean_pick(scorer, pools) == pytest.approx(outcome.best_pick, abs=1e-6)
    assert not scorer.model.training


def test_picks_are_those_of_the_scorer_itself_and_few_programs_are_compiled(scorer: Scorer) -> None:
    settings = plan(batch_tokens=128)
    shapes = shapes_of(scorer, settings, devices=8)
    engine = new_engine(scorer, settings, devices=jax.devices())
    pools = pools_to_check(copy_groups(30, longest=30, seed=2), 5, 0)
    exam = new_exam(scorer, [*pools, *pools], shapes)
    assert loop.mean_pick(engine, exam) == pytest.approx(mean_pick(scorer, pools), abs=1e-6)
    assert sum(len(chosen) for chosen, _ in exam.batches) == sum(len(pool.responses) for pool in pools)
    loop.mean_pick(engine, exam)
    assert engine.compiled["score"] == len({tokens.ids.shape for _, tokens in exam.batches}) > 1


def test_a_run_compiles_one_program_per_shape_and_function(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Engine] = []

    def remembered(*given: object, **named: object) -> Engine:
        engines.append(new_engine(*given, **named))  # type: ignore[arg-type]
        return engines[-1]

    monkeypatch.setattr(loop, "new_engine", remembered)
    settings = plan(**{**GIVEN, "batch_tokens": 256, "epochs": 6.0, "patience": 99})
    mixed = copy_groups(40, longest=24)
    fit(scorer, mixed, mixed[:9], settings, checkpoints=tmp_path, progress=silent, devices=jax.devices()[:1])
    shapes = shapes_of(scorer, settings, devices=1)
    print(f"30 updates compiled {dict(engines[0].compiled)} over {len(shapes.all)} shapes")
    assert engines[0].compiled["apply"] == 1
    assert 2 <= engines[0].compiled["accumulate"] <= len(shapes.all) <= 6
    assert engines[0].compiled["score"] <= len(shapes.all)


def test_without_validation_instances_the_last_weights_are_the_best(scorer: Scorer, tmp_path: Path) -> None:
    outcome = fit(scorer, TRAIN, [], plan(**GIVEN), checkpoints=tmp_path, progress=silent, devices=jax.devices()[:1])
    assert outcome.best_update == outcome.updates == UPDATES


def test_nothing_to_learn_from_is_said(scorer: Scorer, tmp_path: Path) -> None:
    alone = copy_groups(1)
    alone = [type(g)(g.instruction, g.responses[:1], g.labels[:1], g.selectable[:1]) for g in alone]
    with pytest.raises(ConfigError, match="no training instance has two different responses"):
        tpu.fit(scorer, alone, [], plan(), checkpoints=tmp_path, progress=silent)
