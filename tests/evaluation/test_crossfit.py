"""Cross-fitting tests every instance once, by a scorer that saw neither it nor anything of its group."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wording import assert_names, raises_naming

from cappy.config import build
from cappy.errors import ConfigError, FolderError
from cappy.evaluation import crossfit, read_report
from cappy.evaluation.findings import OUT_OF_FOLD
from cappy.evaluation.protocol import EvaluatedSplit, ScoredSplit, build_report, select_split
from cappy.evaluation.step import EvaluationConfig, run
from cappy.progress import silent
from cappy.records import Instance, Manifest, prompt_hash, read, write
from cappy.records.folder import describe_files, write_manifest
from cappy.registry.gate import decide
from cappy.scoring import TRAINED_ON, Scorer
from cappy.scoring.calibration import read_calibration
from cappy.scoring.training_data import count_seen, training_data, write_training_data
from cappy.selection import read_selector
from cappy.selection.linear import standardize
from cappy.selection.pools import Pool, collect_pools, pick_labels, score_pools, with_scores
from cappy.training.loop import TrainingRun

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


@pytest.fixture
def grouped(make_instance: Callable[..., Instance]) -> list[Instance]:
    """60 instances of two tasks, in groups of two templates."""
    made = [make_instance(index, task="one" if index < 40 else "two") for index in range(60)]
    return [replace(one, group_id=f"row {index // 2}") for index, one in enumerate(made)]


@pytest.mark.parametrize("count", [3, 5, 7])
def test_every_instance_is_tested_once_held_out_once_and_trained_on_otherwise(
    grouped: list[Instance], count: int
) -> None:
    seen: dict[str, Counter[str]] = {one.instance_id: Counter() for one in grouped}
    for fold in crossfit.split_folds(grouped, count, seed=0):
        for one in fold:
            seen[one.instance_id][one.split] += 1
    assert all(dict(result) == {"test": 1, "validation": 1, "train": count - 2} for result in seen.values())


def test_groups_stay_together_and_tasks_are_spread(grouped: list[Instance]) -> None:
    for fold in crossfit.split_folds(grouped, 5, seed=0):
        splits: dict[str, set[str]] = {}
        for one in fold:
            splits.setdefault(one.group_id, set()).add(one.split)
        assert all(len(own) == 1 for own in splits.values())
        tested = Counter(one.task for one in fold if one.split == "test")
        assert tested == {"one": 8, "two": 4}


def test_near_duplicates_of_what_a_fold_tests_do_not_train_it(
    make_instance: Callable[..., Instance], tmp_path: Path
) -> None:
    """Forty passages with two questions each, every question in a group of its own."""
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(400)]
    passages = [" ".join(rng.choice(words, 60)) for _ in range(40)]
    instances = [
        replace(
            make_instance(40 * question + number),
            instruction=f"{passage}\n{' '.join(rng.choice(words, 3))}?",
            group_id=f"row {question} {number}",
        )
        for question in range(2)
        for number, passage in enumerate(passages)
    ]
    for number, fold in enumerate(crossfit.split_folds(instances, 5, seed=0)):
        tested = [one for one in fold if one.split == "test"]
        kept = {one.instance_id for one in tested}
        everything = [*tested, *(replace(one, split="train") for one in instances if one.instance_id not in kept)]
        assert leaked(tmp_path / f"all-{number}", everything, tested) > 5
        assert leaked(tmp_path / f"fold-{number}", fold, tested) == 0
        assert len(tested) == 16


def leaked(folder: Path, instances: Sequence[Instance], tested: Sequence[Instance]) -> int:
    """How many of those tested a scorer has seen that was trained on what is not test among the instances."""
    write(folder / "instances", instances)
    prompts = {prompt_hash(one.instruction) for one in instances if one.split != "test"}
    np.array(sorted(prompts), dtype="<u8").tofile(folder / TRAINED_ON)
    write_training_data(folder, folder / "instances")
    return count_seen(tested, training_data(folder))


def test_the_seed_decides_the_folds(grouped: list[Instance]) -> None:
    first, again, other = (
        [one.split for one in next(crossfit.split_folds(grouped, 5, seed=seed))] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_fewer_groups_than_folds_are_refused(grouped: list[Instance]) -> None:
    with raises_naming(ConfigError, "--folds 5", "3 groups"):
        list(crossfit.split_folds(grouped[:6], 5, seed=0))


class Fold:
    """A scorer of a fold: it knows the labels of what it was trained on, and guesses the others'."""

    version = "abcdef123456"

    def __init__(self, folder: Path, score: Score) -> None:
        self.trained = set(json.loads((folder / "trained.json").read_text()))
        self._score = score

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [
            99.0 if instruction in self.trained else own
            for (instruction, _), own in zip(pairs, self._score(pairs), strict=True)
        ]


def test_a_folds_selector_does_not_depend_on_labels_of_that_fold(
    make_instance: Callable[..., Instance], score: Score, tmp_path: Path
) -> None:
    """Nor does the selector that picks from held-out pools, for the calibration, depend on their labels."""
    made = [make_instance(index) for index in range(60)]

    def fitted(instances: Sequence[Instance], name: str) -> list[EvaluatedSplit]:
        def train(step: str, settings: Mapping[str, Any], progress: object) -> None:
            Path(settings["target"]).mkdir(parents=True)
            (Path(settings["target"]) / "trained.json").write_text("[]")

        settings = crossfit.CrossFitting(folds=4, seed=0, metric="rougeL", with_probes=False, work=tmp_path)
        (tmp_path / name).mkdir()
        evaluated, _ = crossfit.evaluate_folds(
            settings,
            instances,
            ("finetuning", {}),
            tmp_path / name,
            load=lambda folder: Fold(Path(folder), score),
            progress=silent,
            train=train,
        )
        return evaluated

    def opposite(instance: Instance) -> Instance:
        labels = [replace(c, labels={"rougeL": 1 - c.labels["rougeL"]}) for c in instance.candidates]
        return replace(instance, candidates=tuple(labels))

    first = fitted(made, "first")
    tested = {pool.instance.instance_id for pool in first[1].pools}
    second = fitted([opposite(one) if one.instance_id in tested else one for one in made], "second")
    assert all(split.selector.evidence == "out-of-fold" and split.selector.groups == 45 for split in first)
    changed = [own.selector != other.selector for own, other in zip(first, second, strict=True)]
    assert changed == [True, False, True, True]
    # The held-out pools of fold 0 are those that fold 1 tests.
    assert first[0].held_out_selectors == second[0].held_out_selectors
    assert first[0].held_out_selectors[0].groups == 30


def test_no_instance_is_tested_or_held_out_by_a_scorer_that_saw_it(
    tmp_path: Path, grouped: list[Instance], score: Score
) -> None:
    four = crossfit.CrossFitting(folds=4, seed=0, metric="rougeL", with_probes=True, work=tmp_path)
    asked: list[Mapping[str, Any]] = []

    def train(step: str, settings: Mapping[str, Any], progress: object) -> None:
        asked.append(settings)
        target = Path(settings["target"])
        target.mkdir(parents=True)
        learned = [one.instruction for one in read(settings["source"]) if one.split == "train"]
        (target / "trained.json").write_text(json.dumps(learned))

    evaluated, skipped = crossfit.evaluate_folds(
        four,
        grouped,
        ("finetuning", {"scorer": "builtin:tiny", "epochs": 3.0}),
        tmp_path,
        load=lambda folder: Fold(Path(folder), score),
        progress=silent,
        train=train,
    )
    assert skipped == 0
    assert sorted(pool.instance.instance_id for own in evaluated for pool in own.pools) == sorted(
        one.instance_id for one in grouped
    )
    scores = [pool.scores["scorer"] for own in evaluated for pool in (*own.pools, *own.held_out)]
    assert len(scores) == 2 * len(grouped)
    assert all(own.max() < 99 for own in scores)
    assert {settings["epochs"] for settings in asked} == {3.0}

    def trained_on(folder: Path) -> np.ndarray:
        return np.array(
            [prompt_hash(text) for text in json.loads((folder / "trained.json").read_text())], dtype=np.uint64
        )

    assert crossfit.count_leaks(evaluated, tmp_path, trained_on) == 0
    of_first = trained_on(tmp_path / ".fold-1-scorer")
    assert crossfit.count_leaks(evaluated, tmp_path, lambda folder: of_first) == len(of_first) > 20


@pytest.mark.parametrize("folds", [1, 2])
def test_folds_that_make_no_sense_are_refused(tmp_path: Path, folds: int) -> None:
    with raises_naming(ConfigError, "--folds", "at least 3", str(folds)):
        build(EvaluationConfig, {"source": tmp_path, "scorer": tmp_path, "target": tmp_path, "folds": folds})


def scored(pools: Sequence[Pool], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(len(pool.candidates)) for pool in pools]


def evaluated_split(pools: Sequence[Pool], seed: int) -> EvaluatedSplit:
    pools = with_scores(pools, "scorer", scored(pools, seed))
    return select_split(ScoredSplit(pools=pools, held_out=[]), metric="rougeL", seed=0)


@pytest.fixture
def champion(tmp_path: Path, grouped: list[Instance]) -> Path:
    """The folder of a champion with out-of-fold scores of all instances."""
    pools = collect_pools(grouped, metric="rougeL", splits={one.split for one in grouped})
    text = crossfit.out_of_fold_json([evaluated_split(pools, seed=7)], metric="rougeL", leaks=0)
    (tmp_path / OUT_OF_FOLD).write_text(text)
    return tmp_path


def test_two_recipes_are_compared_on_their_picks_of_the_same_instances(grouped: list[Instance], champion: Path) -> None:
    pools = collect_pools(grouped, metric="rougeL", splits={one.split for one in grouped})
    shuffled = [pools[index] for index in np.random.default_rng(0).permutation(len(pools))]
    splits = [evaluated_split(shuffled[:20], 1), evaluated_split(shuffled[20:], 2)]
    joined, leaks = crossfit.add_champion_scores(splits, champion, "rougeL")
    assert leaks == {"champion": 0}
    report = build_report(joined, metric="rougeL", split="cross-fitted", seed=0, folds=5)
    expected = pick_labels(pools, scored(pools, seed=7)).mean()
    assert report.selectors["champion"].estimate.mean == pytest.approx(expected)
    assert report.comparisons["selector-champion"].groups == 30


def test_of_a_champion_only_the_instances_of_the_report_count_and_new_ones_are_scored_by_it(
    grouped: list[Instance], champion: Path
) -> None:
    kept = grouped[:-2]
    new = replace(grouped[0], instance_id="new", group_id="new", instruction="Another one.")
    pools = collect_pools([*kept, new], metric="rougeL", splits={one.split for one in grouped})
    asked: list[str] = []

    def value(unseen: Sequence[Pool]) -> list[np.ndarray]:
        asked.extend(pool.instance.instance_id for pool in unseen)
        return [np.arange(len(pool.labels), dtype=float) for pool in unseen]

    (split,), _ = crossfit.add_champion_scores([evaluated_split(pools, 1)], champion, "rougeL", value)
    assert asked == ["new"]
    values = split.selection.values["champion"]
    assert values[-1].tolist() == list(range(len(pools[-1].labels)))
    of_all = collect_pools(grouped, metric="rougeL", splits={one.split for one in grouped})
    stored = [standardize(each) for each in scored(of_all, seed=7)[:-2]]
    assert [each.tolist() for each in values[:-1]] == [each.tolist() for each in stored]
    (split,), _ = crossfit.add_champion_scores([evaluated_split(pools, 1)], champion, "rougeL", lambda unseen: None)
    assert "only 58 of them" in split.selection.unavailable["champion"]


def reworded(grouped: list[Instance]) -> list[Instance]:
    return [replace(grouped[0], instruction="Another wording."), *grouped[1:]]


def sampled_again(grouped: list[Instance]) -> list[Instance]:
    first = replace(grouped[0], candidates=tuple(reversed(grouped[0].candidates)))
    return [first, *grouped[1:]]


@pytest.mark.parametrize("changed", [reworded, sampled_again])
def test_picks_of_other_instances_compare_nothing_and_the_gate_holds(
    grouped: list[Instance], champion: Path, changed: Callable[[list[Instance]], list[Instance]]
) -> None:
    instances = changed(grouped)
    pools = collect_pools(instances, metric="rougeL", splits={one.split for one in instances})
    splits, leaks = crossfit.add_champion_scores([evaluated_split(pools, 1)], champion, "rougeL")
    report = build_report(splits, metric="rougeL", split="cross-fitted", seed=0, folds=5)
    assert leaks == {}
    assert "selector-champion" not in report.comparisons
    assert_names(report.unavailable["champion"], "60 instances", f"this report {len(pools)}", "59 of them")
    decision = decide(report.to_dict(), has_champion=True)
    assert decision.decision == "hold"
    assert report.unavailable["champion"] in decision.reasons[0]


def test_a_champion_without_out_of_fold_picks_says_what_to_do(grouped: list[Instance], tmp_path: Path) -> None:
    pools = collect_pools(grouped, metric="rougeL", splits={one.split for one in grouped})
    (part,), _ = crossfit.add_champion_scores([evaluated_split(pools, 1)], tmp_path, "rougeL")
    assert_names(part.selection.unavailable["champion"], "no out-of-fold picks", "--folds", "register")


@pytest.mark.parametrize("text", ["", "{}", '{"metric": "rougeL", "folds": 5, "leaks": 0, "scores": {"a": ["x"]}}'])
def test_damaged_out_of_fold_scores_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / OUT_OF_FOLD).write_text(text)
    with raises_naming(FolderError, "out_of_fold.json", "--folds"):
        crossfit.read_out_of_fold(tmp_path)


def test_a_scorer_whose_recipe_is_not_known_is_refused(
    tmp_path: Path, scorer_folder: Path, grouped: list[Instance]
) -> None:
    write(tmp_path / "annotated", grouped)
    places = {"source": tmp_path / "annotated", "target": tmp_path / "report", "work": tmp_path / "work"}
    with raises_naming(ConfigError, "--folds", scorer_folder.name, "recipe"):
        run(build(EvaluationConfig, {"scorer": scorer_folder, "folds": 3, **places}))


def test_a_real_recipe_is_trained_for_each_fold_and_leaves_its_picks(
    tmp_path: Path, scorer_folder: Path, grouped: list[Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings stand in the scorer's own manifest; a second run trains nothing again but what was damaged."""
    Scorer.load(str(scorer_folder), precision="fp32").write(tmp_path / "scorer")
    settings = {"scorer": str(scorer_folder), "epochs": 1.0, "batch_instances": 4, "max_candidates": 3, "checks": 1}
    made = Manifest(step="finetuning", files=describe_files(tmp_path / "scorer"), config=settings)
    write_manifest(tmp_path / "scorer", made)
    write(tmp_path / "annotated", grouped[:30])
    places = {"source": tmp_path / "annotated", "scorer": tmp_path / "scorer", "work": tmp_path / "work"}
    messages: list[str] = []
    updates: list[int] = []
    run_update = TrainingRun.run_update

    def counted(training: TrainingRun) -> None:
        updates.append(training.state.update)
        run_update(training)

    monkeypatch.setattr(TrainingRun, "run_update", counted)

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        messages.append(note)

    values = {"target": tmp_path / "report", "folds": 3, "initial": str(scorer_folder), **places}
    config = build(EvaluationConfig, values)
    first = run(config, progress)
    report = read_report(tmp_path / "report")
    assert (report.folds, report.facts["instances"], report.split) == (3, 30, "cross-fitted")
    assert report.leaks == {"challenger": 0}
    pools = collect_pools(grouped[:30], metric="rougeL", splits={one.split for one in grouped})
    initial = score_pools(pools, Scorer.load(str(scorer_folder), precision="fp32").score, lambda count: None)
    assert report.selectors["initial"].estimate.mean == pytest.approx(pick_labels(pools, initial).mean())
    assert "scorer-initial" in report.comparisons
    assert {note.split(",")[0] for note in messages} >= {"fold 1 of 3", "fold 2 of 3", "fold 3 of 3"}
    left = crossfit.read_out_of_fold(tmp_path / "report")
    assert left is not None
    assert (left.folds, left.leaks, len(left.scores)) == (3, 0, 30)
    assert left.values.keys() == left.scores.keys()
    calibration = read_calibration(tmp_path / "report")
    assert calibration is None, "15 groups are too few for a map"
    assert read_selector(tmp_path / "report").groups == 15, "all folds count, too few to fit a rule"
    trained = Counter(updates)
    assert trained[0] == 3, "each fold is trained from its first update"
    assert set(trained.values()) == {3}
    updates.clear()
    assert run(config).hash == first.hash
    assert updates == []
    damaged = next((tmp_path / "work").rglob(".fold-2-scorer")) / "model.safetensors"
    damaged.unlink()
    damaged.write_bytes(b"no weights")
    assert run(config).hash == first.hash
    assert updates == sorted(trained), "one fold alone is trained again"
