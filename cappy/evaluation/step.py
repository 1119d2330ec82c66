"""The evaluation step: evaluates a scorer on held-out instances, and compares it with the champion if there is one.

`cappy evaluation --source annotated --scorer folder --target report` writes report.json, report.html, report.md,
table.txt, the plots curve.png, curve.svg, calibration.png and calibration.svg, selector.json (the fitted selector),
calibration.json (maps from scores of picks to expected labels), picks.json (read by `cappy threshold`), probe.json (the
verification pairs: scored pairs for verifying a deployment) and, if cross-fitted, out_of_fold.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from cappy.config import ADVANCED, DEFAULT_WORK, Fresh, Location, Work, fingerprint, result_settings, settings
from cappy.progress import Progress, silent
from cappy.records import Instance, Manifest, read, read_manifest
from cappy.records.folder import MANIFEST, describe_files, sha256_of, write_bytes
from cappy.records.work import claim, finish
from cappy.scoring.calibration import CALIBRATION, VERIFICATION_PAIRS, ScoredPair
from cappy.steps import step_version

if TYPE_CHECKING:
    from cappy.evaluation.crossfit import Load
    from cappy.evaluation.protocol import AnyScorer, EvaluatedSplit
    from cappy.evaluation.report import Report
    from cappy.scoring.training_data import ReadTrainingData
    from cappy.selection.linear import Selector
    from cappy.selection.pools import Pool, ScoreFunction, Vector

NUM_VERIFICATION_PAIRS = 32


def _check_folds(folds: int) -> int:
    if folds in (1, 2):
        raise ValueError("must be 0 or at least 3: one to test, one to hold out, the others to train on")
    return folds


@settings
class EvaluationConfig:
    """Evaluate a scorer on held-out instances, and compare it with the current champion."""

    source: Annotated[Location, Field(description="Folder of annotated instances")]
    scorer: Annotated[Location, Field(description="Folder of the scorer to evaluate")]
    target: Annotated[Location, Field(description="Folder to write the report to")]
    champion: Annotated[str, Field(description="Spec of the current champion; empty if there is none")] = ""
    initial: Annotated[
        str, Field(description="Spec of the scorer that training started from, to report beside it; empty if none")
    ] = ""
    metric: Annotated[str, Field(min_length=1, description="Metric of the labels to report")] = "rougeL"
    split: Annotated[Literal["validation", "test"], Field(description="Split to report on")] = "test"
    seed: Annotated[int, Field(ge=0, description="Seed of the MBR curve, the examples and the folds")] = 0
    probe: Annotated[bool, Field(description="Probe the scorer for known weaknesses; scores some pairs again")] = True
    folds: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="Folds of cross-fitting: train with the same settings per fold and test every instance; 0: off",
        ),
        AfterValidator(_check_folds),
    ] = 0
    refit_selector: Annotated[
        bool, ADVANCED, Field(description="Fit a new selector even if the scorer's folder has one (selector.json)")
    ] = False
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""


def run(config: EvaluationConfig, progress: Progress = silent) -> Manifest:
    """Evaluates `scorer` (and `champion`) on `source` and writes the report; an interrupted run keeps its scores."""
    from cappy.scoring import Scorer
    from cappy.scoring.training_data import training_data

    return evaluate_folder(config, progress, load=Scorer.load, trained_on=training_data)


def evaluate_folder(
    config: EvaluationConfig, progress: Progress, *, load: "Load", trained_on: "ReadTrainingData"
) -> Manifest:
    """Runs the step; `load` loads a scorer from a folder, `trained_on` reads what the scorer was trained on."""
    from cappy.evaluation.protocol import build_report, cached_scores, mark_unavailable, seconds_per_pair
    from cappy.scorers import scorer_folder

    parent = read_manifest(config.source)
    folders = {"challenger": scorer_folder(str(config.scorer))}
    if config.champion:
        folders["champion"] = scorer_folder(config.champion)
    initial_folder = scorer_folder(config.initial) if config.initial else None
    contents = [_content_hash(path) for path in folders.values()]
    if initial_folder is not None:
        contents.append(_content_hash(initial_folder, with_selector=False))
    parents = (parent.hash, *contents)
    with claim(config.work, "evaluation", result_settings(config), parents, fresh=config.fresh) as folder:
        scorers = {name: load(str(path)) for name, path in folders.items()}
        initial, problem = _initial_scores(config, initial_folder, folder, load, trained_on)
        if config.folds:
            evaluated_splits, skipped, leaks = _evaluate_folds(
                config, folders, folder, progress, load, trained_on, initial
            )
        else:
            evaluated_splits, skipped = _evaluate_once(config, scorers, folders, folder, progress, initial)
            leaks = _count_leaks(evaluated_splits, folders, trained_on)
        if problem:
            evaluated_splits = [mark_unavailable(part, "initial", problem) for part in evaluated_splits]
        report = build_report(
            evaluated_splits,
            metric=config.metric,
            split="cross-fitted" if config.folds else config.split,
            seed=config.seed,
            skipped=skipped,
            folds=config.folds,
        )
        _write_selector(folder, evaluated_splits, config, scorers["challenger"].version, folders["challenger"])
        report = replace(
            report,
            leaks=leaks,
            versions={name: scorer.version for name, scorer in scorers.items()},
            selector_hashes={
                name: _selector_hash(folder if name == "challenger" else folders[name]) for name in scorers
            },
            cost=replace(report.cost, seconds=seconds_per_pair(folder)),
        )
        write_report(folder, report)
        _write_picks(folder, evaluated_splits, folds=config.folds, metric=config.metric)
        _write_calibration(folder, evaluated_splits, config)
        tested_instances = [pool.instance for part in evaluated_splits for pool in part.pools]
        score = cached_scores(scorers["challenger"].score, folder, "probe")
        _write_verification_pairs(folder, score_verification_pairs(tested_instances, score, seed=config.seed))
        manifest = Manifest(
            step="evaluation",
            files=describe_files(folder),
            config=result_settings(config),
            step_version=step_version("evaluation"),
            seed=config.seed,
            generators=parent.generators,
            parents=parents,
            metrics=report.metrics(),
            facts={
                "leaks": dict(report.leaks),
                "leak_check": {} if config.folds else _describe_leak_check(tested_instances, folders, trained_on),
                "versions": dict(report.versions),
            },
        )
        return finish(folder, config.target, manifest)


def _initial_scores(
    config: EvaluationConfig, initial: Path | None, work: Path, load: "Load", trained_on: "ReadTrainingData"
) -> "tuple[dict[str, ScoreFunction], str]":
    """The scoring function of the initial scorer by its name, or the reason why its scores are not comparable."""
    from cappy.evaluation.protocol import cached_scores
    from cappy.model_folder import open_model_folder
    from cappy.scoring.model import is_encoder
    from cappy.scoring.training_data import count_seen

    if initial is None:
        return {}, ""
    folder = open_model_folder(initial)
    if is_encoder(folder, folder.config(), strict=False):
        return {}, "training started from an encoder, which has no head and gives no scores"
    reported = list(read(config.source) if config.folds else read(config.source, splits=[config.split]))
    if seen := count_seen(reported, trained_on(initial)):
        return {}, f"it was trained on {seen} of the reported instances, or on others from the same rows"
    return {"initial": cached_scores(load(str(initial)).score, work, "initial")}, ""


def _evaluate_once(
    config: EvaluationConfig,
    scorers: "Mapping[str, AnyScorer]",
    folders: Mapping[str, Path],
    folder: Path,
    progress: Progress,
    initial: "Mapping[str, ScoreFunction]",
) -> "tuple[list[EvaluatedSplit], int]":
    """Evaluates the split of the config, and counts its instances without candidates."""
    from cappy.evaluation.protocol import cached_scores, score_split, select_split, split_pools

    instances = read(config.source, splits=sorted({config.split, "validation"}))
    pools, held_out, skipped = split_pools(instances, metric=config.metric, split=config.split)
    scores = {name: cached_scores(scorer.score, folder, name) for name, scorer in scorers.items()}
    scored = score_split(
        pools,
        held_out,
        scores.pop("challenger"),
        {**scores, **initial},
        seed=config.seed,
        with_probes=config.probe,
        progress=progress,
    )
    own = {name: _own_selector(path, scorers[name].version) for name, path in folders.items()}
    selected = select_split(
        scored,
        metric=config.metric,
        seed=config.seed,
        scorer=scorers["challenger"].version,
        selector=None if config.refit_selector else own["challenger"],
        champion=own.get("champion"),
    )
    return [selected], skipped


def _own_selector(folder: Path, version: str) -> "Selector | None":
    """The selector in a scorer's folder; None without one."""
    from cappy.selection.linear import read_selector

    return read_selector(folder, version) if _selector_hash(folder) else None


def _evaluate_folds(
    config: EvaluationConfig,
    folders: Mapping[str, Path],
    folder: Path,
    progress: Progress,
    load: "Load",
    trained_on: "ReadTrainingData",
    initial: "Mapping[str, ScoreFunction]",
) -> "tuple[list[EvaluatedSplit], int, dict[str, int]]":
    """Evaluates every fold, counts instances without candidates and leaks, and writes the out-of-fold scores."""
    from cappy.evaluation import crossfit
    from cappy.evaluation.findings import OUT_OF_FOLD

    cross_fitting = crossfit.CrossFitting(
        folds=config.folds,
        seed=config.seed,
        metric=config.metric,
        with_probes=config.probe,
        work=config.work,
        fresh=config.fresh,
    )
    recipe = crossfit.read_recipe(read_manifest(folders["challenger"]), config.scorer)
    instances = list(read(config.source))
    evaluated_splits, skipped = crossfit.evaluate_folds(
        cross_fitting, instances, recipe, folder, load=load, progress=progress, others=initial
    )
    leaks = {"challenger": crossfit.count_leaks(evaluated_splits, folder, trained_on)}
    text = crossfit.out_of_fold_json(evaluated_splits, metric=config.metric, leaks=leaks["challenger"])
    write_bytes(folder / OUT_OF_FOLD, text.encode())
    if config.champion:
        value_unseen = partial(_value_unseen, folders["champion"], folder, load, trained_on)
        evaluated_splits, champion_leaks = crossfit.add_champion_scores(
            evaluated_splits, folders["champion"], config.metric, value_unseen
        )
        leaks |= champion_leaks
    return evaluated_splits, skipped, leaks


def _value_unseen(
    champion: Path, work: Path, load: "Load", trained_on: "ReadTrainingData", pools: "Sequence[Pool]"
) -> "list[Vector] | None":
    """The values that the champion's selector gives to pools; None if the champion was trained on one of them."""
    from cappy.evaluation.protocol import cached_scores
    from cappy.scoring.training_data import count_seen
    from cappy.selection.linear import features_of, read_selector
    from cappy.selection.pools import score_pools, with_scores

    if count_seen([pool.instance for pool in pools], trained_on(champion)):
        return None
    scorer = load(str(champion))
    selector = read_selector(champion, scorer.version)
    score = cached_scores(scorer.score, work, "champion")
    scored = with_scores(pools, "champion", score_pools(pools, score, lambda count: None))
    decoding = selector.decoding_in(scored)
    return [selector.values(features_of(pool, decoding, "champion")) for pool in scored]


def _count_leaks(
    evaluated_splits: "Sequence[EvaluatedSplit]", folders: Mapping[str, Path], trained_on: "ReadTrainingData"
) -> dict[str, int]:
    from cappy.scoring.training_data import count_seen

    tested_instances = [pool.instance for part in evaluated_splits for pool in part.pools]
    return {name: count_seen(tested_instances, trained_on(path)) for name, path in folders.items()}


def _describe_leak_check(
    tested_instances: Sequence[Instance], folders: Mapping[str, Path], trained_on: "ReadTrainingData"
) -> dict[str, dict[str, int | str]]:
    from cappy.scoring.training_data import describe_leak_check

    return describe_leak_check(tested_instances, {name: trained_on(path) for name, path in folders.items()})


def _content_hash(folder: Path, *, with_selector: bool = True) -> str:
    """Hash of a scorer's content: of its manifest or, if another tool wrote the folder, of its files.

    `with_selector` includes selector.json, which no manifest lists, because it is written by the evaluation.
    """
    content = (
        read_manifest(folder).hash
        if (folder / MANIFEST).is_file()
        else fingerprint([(file.name, file.sha256) for file in describe_files(folder)])
    )
    selector = _selector_hash(folder) if with_selector else ""
    return fingerprint([content, selector]) if selector else content


def _selector_hash(folder: Path) -> str:
    """The sha256 of selector.json in a folder; empty without one."""
    from cappy.selection.linear import SELECTOR

    return sha256_of(folder / SELECTOR) if (folder / SELECTOR).is_file() else ""


def write_report(folder: Path, report: "Report") -> None:
    """Writes report.json, report.html, report.md, table.txt and the plots."""
    from cappy.evaluation import page

    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "report.json", f"{text}\n".encode())
    write_bytes(folder / "report.html", page.render(report).encode())
    write_bytes(folder / "table.txt", report.text().encode())
    write_bytes(folder / "report.md", report.markdown().encode())
    for name, data in page.plot_files(report).items():
        write_bytes(folder / name, data)


def _write_picks(folder: Path, evaluated_splits: "Sequence[EvaluatedSplit]", *, folds: int, metric: str) -> None:
    """Writes picks.json: the selector's held-out and reported picks or, if cross-fitted, its out-of-fold picks."""
    from cappy.evaluation.threshold import PICKS, pick_rows
    from cappy.selection.linear import features_for

    reported = [
        row
        for fold, part in enumerate(evaluated_splits, start=1)
        for row in pick_rows(part.pools, part.selection.values["selector"], fold if folds else None)
    ]
    rows = {"out_of_fold": reported}
    if not folds:
        (part,) = evaluated_splits
        known = features_for(part.held_out, part.held_out_selectors)
        values = [selector.values(each) for selector, each in zip(part.held_out_selectors, known, strict=True)]
        rows = {"held_out": pick_rows(part.held_out, values), "reported": reported}
    write_bytes(folder / PICKS, json.dumps({"metric": metric, **rows}).encode())


def _write_selector(
    folder: Path, evaluated_splits: "Sequence[EvaluatedSplit]", config: EvaluationConfig, scorer: str, source: Path
) -> None:
    """Writes selector.json: the evaluated selector or, if cross-fitted, one fitted on all out-of-fold scores.

    The selector that the scorer's folder `source` has already is copied, so that it stays the same version.
    """
    from cappy.selection.fitting import fit_selector
    from cappy.selection.linear import SELECTOR

    text = evaluated_splits[0].selector.to_json().encode()
    if config.folds:
        pools = [pool for part in evaluated_splits for pool in part.pools]
        selector = fit_selector(pools, metric=config.metric, evidence="out-of-fold", scorer=scorer)
        text = selector.to_json().encode()
    elif _selector_hash(source) and not config.refit_selector:
        text = (source / SELECTOR).read_bytes()
    write_bytes(folder / SELECTOR, text)


def _write_calibration(folder: Path, evaluated_splits: "Sequence[EvaluatedSplit]", config: EvaluationConfig) -> None:
    """Writes calibration.json, fitted on the held-out picks or, if cross-fitted, on the out-of-fold picks."""
    from cappy.evaluation.calibration import fit

    calibration = evaluated_splits[0].calibration
    if config.folds:
        pairs = [(pool, part.selector) for part in evaluated_splits for pool in part.pools]
        pools, selectors = [pool for pool, _ in pairs], [selector for _, selector in pairs]
        calibration = fit(pools, selectors, config.metric, seed=config.seed)
    if calibration is not None:
        write_bytes(folder / CALIBRATION, calibration.to_json().encode())


def score_verification_pairs(
    instances: Sequence[Instance], score: "ScoreFunction", *, seed: int, count: int = NUM_VERIFICATION_PAIRS
) -> list[ScoredPair]:
    """Draws at most `count` pairs at random and scores them, for verifying a deployment later."""
    pairs = [
        (instance.instruction, response)
        for instance in instances
        for response in dict.fromkeys(candidate.response for candidate in instance.selectable)
    ]
    indices = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:count])
    sample = [pairs[index] for index in indices]
    return [(*pair, float(value)) for pair, value in zip(sample, score(sample), strict=True)]


def _write_verification_pairs(folder: Path, scored_pairs: Sequence[ScoredPair]) -> None:
    """Writes probe.json, which `cappy.deployment` and `cappy serve` read."""
    write_bytes(folder / VERIFICATION_PAIRS, json.dumps(scored_pairs, ensure_ascii=False, indent=1).encode())
