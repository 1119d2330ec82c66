"""The evaluation step: reads the instances, keeps scores across restarts, counts leaks, writes the report's files."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cappy.config import code_version, fingerprint, identity
from cappy.evaluation import EvaluationConfig, markdown, page, plot
from cappy.evaluation.pools import Pool, Score, Vector
from cappy.evaluation.protocol import Part, part_of, pools_of, report_of
from cappy.evaluation.report import Report
from cappy.evaluation.selectors import pick
from cappy.evaluation.threshold import PICKS
from cappy.progress import Progress
from cappy.records import Instance, Manifest, prompt_hash, read, read_manifest
from cappy.records.folder import MANIFEST, describe_files, write_bytes
from cappy.records.work import claim, finish
from cappy.scoring.calibration import CALIBRATION
from cappy.specs import scorer_folder

NUM_PROBES = 32
Triple = tuple[str, str, float]


class AnyScorer(Protocol):
    """What the step needs of a scorer."""

    @property
    def version(self) -> str:
        """A name that changes with the weights."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The scores of (instruction, response) pairs, in order."""


def evaluate_folder(
    config: EvaluationConfig,
    progress: Progress,
    *,
    load: Callable[[str], AnyScorer],
    trained_on: Callable[[Path], npt.NDArray[np.uint64]],
) -> Manifest:
    """Evaluates as `config` says; `load` makes a scorer of a folder, `trained_on` its training prompts' hashes."""
    parent = read_manifest(config.source)
    folders = {"challenger": scorer_folder(str(config.scorer))}
    if config.champion:
        folders["champion"] = scorer_folder(config.champion)
    parents = (parent.hash, *(content(folder) for folder in folders.values()))
    with claim(config.work, "evaluation", identity(config), parents) as folder:
        instances = list(read(config.source, splits=sorted({config.split, "validation"})))
        reported = [instance for instance in instances if instance.split == config.split and instance.selectable]
        scorers = {name: load(str(path)) for name, path in folders.items()}
        scores = {name: remembered(scorer.score, folder, name) for name, scorer in scorers.items()}
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
        report = report_of(
            [part],
            metric=config.metric,
            split=config.split,
            seed=config.seed,
            resamples=config.resamples,
            skipped=skipped,
        )
        report = replace(
            report,
            leaks={name: seen_in_training(reported, trained_on(path)) for name, path in folders.items()},
            versions={name: scorer.version for name, scorer in scorers.items()},
            cost=replace(report.cost, seconds=seconds_per_pair(folder, "challenger")),
        )
        write_report(folder, report)
        write_picks(folder, part, config)
        if part.calibration is not None:
            write_bytes(folder / CALIBRATION, part.calibration.to_json().encode())
        write_probe(folder, probe(reported, scores["challenger"], seed=config.seed))
        manifest = Manifest(
            step="evaluation",
            files=describe_files(folder),
            config=identity(config),
            code=code_version(),
            seed=config.seed,
            generators=parent.generators,
            parents=parents,
            metrics=metrics(report),
            facts={"leaks": dict(report.leaks), "versions": dict(report.versions)},
        )
        return finish(folder, config.target, manifest)


def remembered(score: Score, folder: Path, name: str) -> Score:
    """`score`, each call's answer kept in a hidden file of the work folder: a restart does not score it again.

    The file has the seconds that it took too.
    """

    def scores(pairs: Sequence[tuple[str, str]]) -> list[float]:
        key = hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()[:16]
        path = folder / f".{name}-{key}.json"
        if not path.is_file():
            started = time.monotonic()
            values = [float(value) for value in score(pairs)]
            told = {"scores": values, "seconds": time.monotonic() - started}
            write_bytes(path, json.dumps(told).encode())
        kept: list[float] = json.loads(path.read_text())["scores"]
        return kept

    return scores


def seconds_per_pair(folder: Path, name: str) -> float | None:
    """The scorer's time for a pair, over the calls with 100 pairs or more that `remembered` kept, else all."""
    calls = [json.loads(path.read_text()) for path in sorted(folder.glob(f".{name}-*.json"))]
    large = [call for call in calls if len(call["scores"]) >= 100] or calls
    pairs = sum(len(call["scores"]) for call in large)
    return sum(call["seconds"] for call in large) / pairs if pairs else None


def write_picks(folder: Path, part: Part, config: EvaluationConfig) -> None:
    """Writes picks.json: the score and label of the scorer's pick of every instance, held-out and reported."""
    held, reported = (part.held_out, part.held_scores), (part.pools, part.rules.values["scorer"])
    values = {
        "metric": config.metric,
        "held_out": _picked(*held),
        "reported": _picked(*reported),
    }
    write_bytes(folder / PICKS, json.dumps(values).encode())


def _picked(pools: Sequence[Pool], scores: Sequence[Vector]) -> list[tuple[float, float]]:
    picks = [(pick(values), values, pool) for pool, values in zip(pools, scores, strict=True)]
    return [(float(values[index]), float(pool.labels[index])) for index, values, pool in picks]


def content(folder: Path) -> str:
    """What identifies a scorer: its manifest's hash, or, where another tool wrote it, its files'."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).hash
    return fingerprint([(file.name, file.sha256) for file in describe_files(folder)])


def seen_in_training(instances: Sequence[Instance], trained_on: npt.NDArray[np.uint64]) -> int:
    """How many of the instances have a prompt whose hash is among those trained on."""
    prompts = np.array([prompt_hash(instance.instruction) for instance in instances], dtype=np.uint64)
    return int(np.isin(prompts, trained_on).sum())


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
    write_bytes(folder / "probe.json", json.dumps(triples, ensure_ascii=False, indent=1).encode())


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
