"""Measures the speed of each step on this machine, for `cappy plan`.

    python benchmarks/throughput.py [--parts texts records sampling training scoring starts]
        [--generators builtin flan-t5-small bart0 t0-3b] [--scorers mini roberta-base roberta-large] [--hardware cpu]

It measures the library's own functions in one process with one thread, after a warm-up where a
long run would be warm: rendered prompts, labelled and
tokenized pairs, sampling of 5 responses, training updates, scored pairs. Seconds are CPU seconds of the process, so
that other work on the machine matters little. Models have published shapes and random weights, which do not affect
speed (they rarely end a response, so responses have the maximum length). Texts come from T0's mixture in its
proportions (`throughput_texts.py`, which needs the shared data) and from the built-in tasks. Speeds of models are
stored in floating point operations per second, as counted by `cappy.costing.costs`, so that other text lengths can be
planned.

New measurements replace the entries with the same key in `benchmarks/results/throughput.json`; the others stay. On a
GPU give its name in `cappy plan` (`--hardware h100`) and the parts sampling, training and scoring; this was never run.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from builtin_steps import HIDDEN, LAYERS, LENGTH, POOL, builtin_volumes, run_steps, size_of
from pydantic import TypeAdapter
from scoring_data import roberta_tokenizer
from throughput_bench import Bench
from throughput_models import measure_sampling, measure_scoring, measure_training
from throughput_texts import (
    builtin_instances,
    held_out_lengths,
    held_out_rows,
    instance_lengths,
    render,
    t0_instances,
    t0_lengths,
    t0_prompts,
)

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.costing import DEFAULT_THROUGHPUT_PATH, Measurement, PlanConfig, Throughput, read_throughput
from cappy.costing.costs import GENERATORS, HARDWARE, SCORERS, cost, list_work
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import Instance, write
from cappy.scoring.encoding import PairEncoder
from cappy.training.corpus import open_corpora
from cappy.training.pretraining import new_encoder

PARTS = ("texts", "records", "sampling", "training", "scoring", "starts")
SAMPLING_INTERVAL = 5_000
"""One of this many prompts of T0's mixture is in the sample."""
SAMPLED_PART = 64
"""Instances per part that sampling writes by default; smaller parts need more bytes per instance."""
PER_FAMILY = 8
"""Instances of each built-in family in the small run of the CLI commands."""


def main() -> None:
    """Measures the chosen parts and updates the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--generators", nargs="*", choices=GENERATORS, default=["builtin", "bart0", "t0-3b", "flan-t5-small"]
    )
    parser.add_argument("--scorers", nargs="*", choices=SCORERS, default=["mini", "roberta-base", "roberta-large"])
    parser.add_argument("--hardware", choices=HARDWARE, default="cpu")
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/throughput"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RAYON_NUM_THREADS"] = "1"
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    bench = Bench(arguments.hardware, arguments.work)
    prompts = t0_prompts()
    measures: dict[str, Callable[[], None]] = {
        "texts": lambda: measure_texts(bench, prompts),
        "records": lambda: measure_records(bench, t0_instances(prompts, SAMPLING_INTERVAL)),
        "sampling": lambda: measure_sampling(bench, arguments.generators, t0_instances(prompts, SAMPLING_INTERVAL)),
        "training": lambda: measure_training(bench, arguments.scorers, t0_instances(prompts, SAMPLING_INTERVAL)),
        "scoring": lambda: measure_scoring(bench, arguments.scorers, t0_instances(prompts, SAMPLING_INTERVAL)),
        "starts": lambda: measure_starts(bench),
    }
    for part in PARTS:
        if part in arguments.parts:
            measures[part]()
            save(bench)


def save(bench: Bench) -> None:
    """Writes the measurements, and keeps the file's others."""
    old = read_throughput(DEFAULT_THROUGHPUT_PATH) if DEFAULT_THROUGHPUT_PATH.is_file() else None

    def key(measurement: Measurement) -> tuple[str, ...]:
        return (measurement.step, measurement.hardware, measurement.subject, measurement.unit)

    new = {key(m): m for m in (*(old.measurements if old else ()), *bench.measurements)}
    texts = {**(old.texts if old else {}), **bench.texts}
    throughput = Throughput(benchmark="throughput", texts=texts, measurements=tuple(new[name] for name in sorted(new)))
    values = TypeAdapter(Throughput).dump_python(throughput, mode="json", by_alias=True)
    DEFAULT_THROUGHPUT_PATH.write_text(json.dumps(values, indent=1) + "\n")


def measure_texts(bench: Bench, prompts: Any) -> None:
    """Text lengths in tokens of RoBERTa's tokenizer; for the built-in tasks of the built-in one."""
    encoder = PairEncoder(roberta_tokenizer(), 512)
    bench.texts["t0"] = tuple(t0_lengths(prompts, encoder))
    bench.texts["heldout"] = tuple(held_out_lengths(bench.work, encoder))
    builtin_encoder = PairEncoder(new_encoder(LAYERS, HIDDEN, LENGTH)[1], LENGTH)
    bench.texts["builtin"] = tuple(instance_lengths("builtin", builtin_instances(40), builtin_encoder))


def measure_records(bench: Bench, sample: Sequence[Instance]) -> None:
    """Preparation, annotation and tokenization in pairs or prompts per second, and the bytes that they write."""
    measure_held_out_preparation(bench)
    seconds, result = bench.time_call(
        lambda: preparation(
            PreparationConfig(target=bench.work / "builtin", pool=POOL, num_per_family=80, work=bench.work / "w")
        )
    )
    bench.record("preparation", "builtin", "prompts/s", result.rows / seconds, prompts=result.rows)
    for dataset, instances, tokenizer, length in (
        ("t0", list(sample), roberta_tokenizer(), 512),
        ("builtin", builtin_instances(40), new_encoder(LAYERS, HIDDEN, LENGTH)[1], LENGTH),
    ):
        measure_labels(bench, dataset, instances, PairEncoder(tokenizer, length), tokenizer)


def measure_held_out_preparation(bench: Bench) -> None:
    """Templates on rows of the held-out tasks, because the rows of T0's tasks are only available as prompts."""
    sources = list(held_out_rows(bench.work / "rows", 200))
    for subset, path in held_out_rows(bench.work / "warm", 2):
        render(subset, path, bench.work / "warm", 2)
    seconds, prompts = bench.time_call(
        lambda: [prompt for subset, path in sources for prompt in render(subset, path, bench.work, 200)]
    )
    characters = fmean(len(prompt.instruction) for prompt in prompts)
    bench.record(
        "preparation",
        "t0",
        "prompts/s",
        len(prompts) / seconds,
        hardware="cpu",
        prompts=len(prompts),
        characters=characters,
    )


def measure_labels(
    bench: Bench, dataset: str, sample: Sequence[Instance], encoder: PairEncoder, tokenizer: Any
) -> None:
    """Annotation (the better of two rounds) and tokenization of these instances, and the size of each folder."""
    folder = bench.work / f"records-{dataset}"
    without_candidates = [instance if instance.choices else replace(instance, candidates=()) for instance in sample]
    write(folder / "prepared", without_candidates)
    write(folder / "sampled", sample, part_rows=SAMPLED_PART)
    best, pairs = float("inf"), 0
    for seed in (0, 1):
        config = AnnotationConfig(
            source=folder / "sampled", target=folder / f"annotated-{seed}", work=folder / "work", seed=seed
        )
        seconds, manifest = bench.time_call(lambda: annotation(config))  # noqa: B023
        best, pairs = min(best, seconds), manifest.candidates
    bench.record("annotation", dataset, "pairs/s", pairs / best, hardware="cpu", pairs=pairs, prompts=len(sample))
    seconds, corpora = bench.time_call(
        lambda: open_corpora(folder / "annotated-0", folder / "tokens", tokenizer, encoder, metric="rougeL", sources=())
    )
    tokenized = corpora.train.facts.pairs + corpora.validation.facts.pairs
    bench.record("tokenization", dataset, "pairs/s", tokenized / seconds, hardware="cpu", pairs=tokenized)
    prepared, sampled, annotated, tokens = (
        size_of(folder / name) for name in ("prepared", "sampled", "annotated-0", "tokens")
    )
    num_candidates = sum(len(instance.candidates) for instance in sample if not instance.choices)
    counts = {"prompts": len(sample), "candidates": num_candidates, "pairs": pairs}
    bench.record("preparation", dataset, "bytes/prompt", prepared / len(sample), hardware="cpu", **counts)
    bench.record("sampling", dataset, "bytes/pair", (sampled - prepared) / num_candidates, hardware="cpu", **counts)
    bench.record("annotation", dataset, "bytes/pair", (annotated - prepared) / pairs, hardware="cpu", **counts)
    bench.record("tokenization", dataset, "bytes/pair", tokens / tokenized, hardware="cpu", **counts)


def measure_starts(bench: Bench) -> None:
    """Start time of each CLI command: its CPU seconds in a small run minus the predicted seconds of its work."""
    save(bench)
    throughput = read_throughput(DEFAULT_THROUGHPUT_PATH)
    throughput = replace(
        throughput, measurements=tuple(m for m in throughput.measurements if m.unit != "seconds to start")
    )
    runs = run_steps(bench.work / "small", PER_FAMILY)
    volumes = builtin_volumes(PER_FAMILY, throughput)
    config = PlanConfig(hardware="cpu", mixture="builtin", scorer="mini", validation=0.05)
    expected: dict[str, float] = {}
    for work in list_work(volumes, throughput, config):
        name = "pretraining" if work.step == "tokenization" else work.step
        expected[name] = expected.get(name, 0.0) + cost(work, 1, config, cores=1).seconds
    for step, run in runs.items():
        start = max(0.1, run.cpu_seconds - expected[step])
        details: dict[str, Any] = {"by_the_clock": run.seconds, "whole": run.cpu_seconds, "work": expected[step]}
        bench.record(step, "builtin", "seconds to start", start, **details)


if __name__ == "__main__":
    main()
