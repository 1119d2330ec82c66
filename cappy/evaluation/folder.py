"""A folder evaluated: reads the instances, keeps scores across restarts, counts leaks, writes the report's files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cappy.config import code_version, fingerprint, identity
from cappy.evaluation import crossfit, markdown, out_of_fold, page, plot
from cappy.evaluation.calibration import fit
from cappy.evaluation.crossfit import Load
from cappy.evaluation.leaks import TrainedOn, describe_check, seen_in_training
from cappy.evaluation.out_of_fold import OUT_OF_FOLD
from cappy.evaluation.parts import Part, part_of, pools_of
from cappy.evaluation.pools import Score
from cappy.evaluation.protocol import report_of
from cappy.evaluation.remembered import remembered, seconds_per_pair
from cappy.evaluation.report import Report
from cappy.evaluation.threshold import PICKS, pick_rows
from cappy.progress import Progress
from cappy.records import Instance, Manifest, read, read_manifest
from cappy.records.folder import MANIFEST, describe_files, write_bytes
from cappy.records.work import claim, finish
from cappy.scoring.calibration import CALIBRATION, Calibration
from cappy.scoring.probe import PROBE, Triple
from cappy.specs import scorer_folder

if TYPE_CHECKING:
    from cappy.evaluation.step import EvaluationConfig

NUM_PROBES = 32


def evaluate_folder(config: "EvaluationConfig", progress: Progress, *, load: Load, trained_on: TrainedOn) -> Manifest:
    """Evaluates as `config` says; `load` makes a scorer of a folder, `trained_on` its training prompts' hashes."""
    parent = read_manifest(config.source)
    folders = {"challenger": scorer_folder(str(config.scorer))}
    if config.champion:
        folders["champion"] = scorer_folder(config.champion)
    parents = (parent.hash, *(content(folder) for folder in folders.values()))
    with claim(config.work, "evaluation", identity(config), parents) as folder:
        instances = list(read(config.source, splits=None if config.folds else sorted({config.split, "validation"})))
        scorers = {name: load(str(path)) for name, path in folders.items()}
        if config.folds:
            recipe = crossfit.recipe(read_manifest(folders["challenger"]), config.scorer)
            parts, skipped = crossfit.parts(config, instances, recipe, folder, load=load, progress=progress)
            leaks = {"challenger": crossfit.leaks(parts, folder, trained_on)}
            write_bytes(folder / OUT_OF_FOLD, _out_of_fold(parts, config, leaks["challenger"]).encode())
            if config.champion:
                parts, of_champion = crossfit.with_champion(parts, folders["champion"], config.metric)
                leaks |= of_champion
        else:
            scores = {name: remembered(scorer.score, folder, name) for name, scorer in scorers.items()}
            parts, skipped = once(config, instances, scores, progress)
            tested = [pool.instance for pool in parts[0].pools]
            leaks = {name: seen_in_training(tested, trained_on(path)) for name, path in folders.items()}
        report = report_of(
            parts,
            metric=config.metric,
            split="cross-fitted" if config.folds else config.split,
            seed=config.seed,
            skipped=skipped,
            folds=config.folds,
        )
        report = replace(
            report,
            leaks=leaks,
            versions={name: scorer.version for name, scorer in scorers.items()},
            cost=replace(report.cost, seconds=seconds_per_pair(folder)),
        )
        write_report(folder, report)
        write_picks(folder, parts, config)
        if (fitted := _calibration(parts, config)) is not None:
            write_bytes(folder / CALIBRATION, fitted.to_json().encode())
        tested = [pool.instance for part in parts for pool in part.pools]
        write_probe(folder, probe(tested, remembered(scorers["challenger"].score, folder, "probe"), seed=config.seed))
        manifest = Manifest(
            step="evaluation",
            files=describe_files(folder),
            config=identity(config),
            code=code_version(),
            seed=config.seed,
            generators=parent.generators,
            parents=parents,
            metrics=metrics(report),
            facts={
                "leaks": dict(report.leaks),
                "leak_check": {}
                if config.folds
                else describe_check(tested, {n: trained_on(p) for n, p in folders.items()}),
                "versions": dict(report.versions),
            },
        )
        return finish(folder, config.target, manifest)


def _calibration(parts: Sequence[Part], config: "EvaluationConfig") -> Calibration | None:
    """The map that travels with the scorer: of held-out picks, or of the out-of-fold picks of its recipe."""
    if not config.folds:
        return parts[0].calibration
    pools = [pool for part in parts for pool in part.pools]
    return fit(pools, [values for part in parts for values in part.rules.values["scorer"]], config.metric)


def _out_of_fold(parts: Sequence[Part], config: "EvaluationConfig", leaks: int) -> str:
    pools = [pool for part in parts for pool in part.pools]
    scores = [values for part in parts for values in part.rules.values["scorer"]]
    return out_of_fold.to_json(pools, scores, metric=config.metric, folds=config.folds, leaks=leaks)


def once(
    config: "EvaluationConfig", instances: Sequence[Instance], scores: Mapping[str, Score], progress: Progress
) -> tuple[list[Part], int]:
    """The one part of an evaluation, and how many instances have no candidate."""
    pools, held_out, skipped = pools_of(instances, metric=config.metric, split=config.split)
    part = part_of(
        pools,
        held_out,
        scores["challenger"],
        scores.get("champion"),
        metric=config.metric,
        seed=config.seed,
        probe=config.probe,
        progress=progress,
    )
    return [part], skipped


def write_picks(folder: Path, parts: Sequence[Part], config: "EvaluationConfig") -> None:
    """Writes picks.json, the scorer's pick of every instance: held-out and reported, or out of fold (`pick_rows`)."""
    scored = [(part, part.rules.values["scorer"]) for part in parts]
    if config.folds:
        rows = {"out_of_fold": [pick_rows(part.pools, own, fold) for fold, (part, own) in enumerate(scored, start=1)]}
    else:
        rows = {
            "held_out": [pick_rows(part.held_out, part.held_scores) for part in parts],
            "reported": [pick_rows(part.pools, own) for part, own in scored],
        }
    values = {"metric": config.metric} | {name: list(chain(*found)) for name, found in rows.items()}
    write_bytes(folder / PICKS, json.dumps(values).encode())


def content(folder: Path) -> str:
    """What identifies a scorer: its manifest's hash, or, where another tool wrote it, its files'."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).hash
    return fingerprint([(file.name, file.sha256) for file in describe_files(folder)])


def probe(instances: Sequence[Instance], score: Score, *, seed: int, count: int = NUM_PROBES) -> list[Triple]:
    """At most `count` (instruction, response, score) triples, for a served scorer to be checked against."""
    pairs = [
        (instance.instruction, response)
        for instance in instances
        for response in dict.fromkeys(candidate.response for candidate in instance.selectable)
    ]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:count])
    chosen = [pairs[index] for index in drawn]
    return [(*pair, float(value)) for pair, value in zip(chosen, score(chosen), strict=True)]


def write_probe(folder: Path, triples: Sequence[Triple]) -> None:
    """Writes probe.json."""
    write_bytes(folder / PROBE, json.dumps(triples, ensure_ascii=False, indent=1).encode())


def write_report(folder: Path, report: Report) -> None:
    """Writes report.json, report.html, report.md, table.txt and the plots."""
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "report.json", f"{text}\n".encode())
    write_bytes(folder / "report.html", page.render(report).encode())
    write_bytes(folder / "table.txt", report.text().encode())
    write_bytes(folder / "report.md", markdown.render(report).encode())
    for name, data in plot.files(report).items():
        write_bytes(folder / name, data)


def metrics(report: Report) -> dict[str, float]:
    """The numbers that a pipeline shows beside the run."""
    numbers = {"num_instances": float(report.facts["instances"])}
    for name, row in report.selectors.items():
        numbers[f"{report.metric}_{name}"] = row.estimate.mean
    for key, difference in report.comparisons.items():
        one, _, other = key.partition("-")
        if one == "scorer":
            numbers[f"gain_over_{other}"] = difference.difference
            numbers[f"gain_over_{other}_low"] = difference.low
    if report.calibration is not None:
        best = report.calibration.calibrated or report.calibration.raw
        numbers |= {"ece": best.ece, "brier": best.brier}
    numbers |= {f"probe_{one.name.replace(' ', '_')}": one.value for one in report.probes}
    return numbers | {f"leaks_{name}": float(count) for name, count in report.leaks.items()}
