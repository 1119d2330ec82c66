"""How fast each step is on this machine: the file that `cappy plan` computes with.

    python benchmarks/throughput.py [--parts texts records sampling training scoring starts]
        [--generators builtin flan-t5-small bart0 t0-3b] [--scorers mini roberta-base roberta-large] [--hardware cpu]

Measured are the library's own functions, one process with one thread, warmed up where a long run would be warm:
prompts rendered, pairs labelled and tokenized, generators sampling 5 responses, training updates, scored pairs. Seconds
are those of the processor's time that the process had, so that other work on the machine counts little. Models have
published shapes and random weights, which no speed depends on (random weights seldom end a response, so all are of the
length asked for). Texts are those of T0's mixture in its proportions (`throughput_texts.py`, which needs the shared
data) and the built-in tasks. Speeds of models are kept in floating point operations a second, as `cappy.costing.costs`
counts them, so that other lengths of text can be planned.

What was measured replaces the entries of the same name in `benchmarks/results/throughput.json`; all others stay. On a
GPU give its name as `cappy plan` knows it (`--hardware h100`) and the parts sampling, training and scoring: nothing of
that has ever been run.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from builtin_steps import HIDDEN, LAYERS, LENGTH, POOL, builtin_volumes, run_steps, size_of
from scoring_data import roberta_tokenizer
from throughput_bench import Bench
from throughput_models import measure_sampling, measure_scoring, measure_training
from throughput_texts import (
    builtin_instances,
    held_out_rows,
    held_out_texts,
    instance_texts,
    render,
    t0_instances,
    t0_prompts,
    t0_texts,
)

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.builtin.scorer import new_encoder
from cappy.costing import DEFAULT, Measurement, PlanConfig, Throughput, read_throughput
from cappy.costing.costs import GENERATORS, HARDWARE, SCORERS, cost, list_work
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import Instance, write
from cappy.scoring.encoding import PairEncoder
from cappy.training.corpus import open_corpora

PARTS = ("texts", "records", "sampling", "training", "scoring", "starts")
ONE_OF = 5_000
"""One of so many prompts of T0's mixture is measured with."""
SAMPLED_PART = 64
"""Instances of a part that sampling writes by default: smaller parts weigh more."""
PER_FAMILY = 8
"""Instances of a built-in family in the small run through the verbs."""


def main() -> None:
    """Measures the parts that are asked for and writes them among the others."""
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
        "records": lambda: measure_records(bench, t0_instances(prompts, ONE_OF)),
        "sampling": lambda: measure_sampling(bench, arguments.generators, t0_instances(prompts, ONE_OF)),
        "training": lambda: measure_training(bench, arguments.scorers, t0_instances(prompts, ONE_OF)),
        "scoring": lambda: measure_scoring(bench, arguments.scorers, t0_instances(prompts, ONE_OF)),
        "starts": lambda: measure_starts(bench),
    }
    for part in PARTS:
        if part in arguments.parts:
            measures[part]()
            keep(bench)


def keep(bench: Bench) -> None:
    """Writes what was found among what the file held before."""
    old = read_throughput(DEFAULT) if DEFAULT.is_file() else None

    def key(found: Measurement) -> tuple[str, ...]:
        return (found.step, found.hardware, found.of, found.unit)

    new = {key(m): m for m in (*(old.measurements if old else ()), *bench.found)}
    texts = {**(old.texts if old else {}), **bench.texts}
    made = Throughput(benchmark="throughput", texts=texts, measurements=tuple(new[name] for name in sorted(new)))
    DEFAULT.write_text(json.dumps(asdict(made), indent=1) + "\n")


def measure_texts(bench: Bench, prompts: Any) -> None:
    """Lengths, by RoBERTa's tokenizer and, of the built-in tasks, by the built-in one."""
    encoder = PairEncoder(roberta_tokenizer(), 512)
    bench.texts["t0"] = tuple(t0_texts(prompts, encoder))
    bench.texts["heldout"] = tuple(held_out_texts(bench.work, encoder))
    own = PairEncoder(new_encoder(LAYERS, HIDDEN, LENGTH)[1], LENGTH)
    bench.texts["builtin"] = tuple(instance_texts("builtin", builtin_instances(40), own))


def measure_records(bench: Bench, sample: Sequence[Instance]) -> None:
    """Preparation, annotation and tokenization, in pairs or prompts a second; bytes of what they write."""
    preparation_of_heldout(bench)
    seconds, made = bench.time_call(
        lambda: preparation(
            PreparationConfig(target=bench.work / "builtin", pool=POOL, num_per_family=80, work=bench.work / "w")
        )
    )
    bench.note("preparation", "builtin", "prompts/s", made.rows / seconds, prompts=made.rows)
    for of, instances, tokenizer, length in (
        ("t0", list(sample), roberta_tokenizer(), 512),
        ("builtin", builtin_instances(40), new_encoder(LAYERS, HIDDEN, LENGTH)[1], LENGTH),
    ):
        measure_labels(bench, of, instances, PairEncoder(tokenizer, length), tokenizer)


def preparation_of_heldout(bench: Bench) -> None:
    """Templates rendered over rows of the held-out tasks: the only rows at hand; T0's come prompted."""
    sources = list(held_out_rows(bench.work / "rows", 200))
    for subset, path in held_out_rows(bench.work / "warm", 2):
        render(subset, path, bench.work / "warm", 2)
    seconds, made = bench.time_call(
        lambda: [one for subset, path in sources for one in render(subset, path, bench.work, 200)]
    )
    characters = fmean(len(one.instruction) for one in made)
    bench.note(
        "preparation", "t0", "prompts/s", len(made) / seconds, hardware="cpu", prompts=len(made), characters=characters
    )


def measure_labels(bench: Bench, of: str, sample: Sequence[Instance], encoder: PairEncoder, tokenizer: Any) -> None:
    """Annotation and tokenization of these instances, the better of two rounds; what each folder weighs."""
    folder = bench.work / f"records-{of}"
    bare = [one if one.choices else replace(one, candidates=()) for one in sample]
    write(folder / "prepared", bare)
    write(folder / "sampled", sample, part_rows=SAMPLED_PART)
    best, pairs = float("inf"), 0
    for seed in (0, 1):
        config = AnnotationConfig(
            source=folder / "sampled", target=folder / f"annotated-{seed}", work=folder / "work", seed=seed
        )
        seconds, made = bench.time_call(lambda: annotation(config))  # noqa: B023
        best, pairs = min(best, seconds), made.candidates
    bench.note("annotation", of, "pairs/s", pairs / best, hardware="cpu", pairs=pairs, prompts=len(sample))
    seconds, corpora = bench.time_call(
        lambda: open_corpora(folder / "annotated-0", folder / "tokens", tokenizer, encoder, metric="rougeL", sources=())
    )
    tokenized = corpora.train.facts.pairs + corpora.validation.facts.pairs
    bench.note("tokenization", of, "pairs/s", tokenized / seconds, hardware="cpu", pairs=tokenized)
    prepared, sampled, annotated, tokens = (
        size_of(folder / name) for name in ("prepared", "sampled", "annotated-0", "tokens")
    )
    drawn = sum(len(one.candidates) for one in sample if not one.choices)
    each = {"prompts": len(sample), "candidates": drawn, "pairs": pairs}
    bench.note("preparation", of, "bytes/prompt", prepared / len(sample), hardware="cpu", **each)
    bench.note("sampling", of, "bytes/pair", (sampled - prepared) / drawn, hardware="cpu", **each)
    bench.note("annotation", of, "bytes/pair", (annotated - prepared) / pairs, hardware="cpu", **each)
    bench.note("tokenization", of, "bytes/pair", tokens / tokenized, hardware="cpu", **each)


def measure_starts(bench: Bench) -> None:
    """What each verb takes beyond its work, by a small run on the built-in tasks and the speeds measured before."""
    keep(bench)
    known = read_throughput(DEFAULT)
    known = replace(known, measurements=tuple(m for m in known.measurements if m.unit != "seconds to start"))
    ran = run_steps(bench.work / "small", PER_FAMILY)
    volumes = builtin_volumes(PER_FAMILY, known)
    config = PlanConfig(hardware="cpu", mixture="builtin", scorer="mini", validation=0.05)
    expected: dict[str, float] = {}
    for work in list_work(volumes, known, config):
        name = "pretraining" if work.step == "tokenization" else work.step
        expected[name] = expected.get(name, 0.0) + cost(work, 1, config, cores=1).seconds
    for step, one in ran.items():
        start = max(0.1, one.cpu_seconds - expected[step])
        details: dict[str, Any] = {"by_the_clock": one.seconds, "whole": one.cpu_seconds, "work": expected[step]}
        bench.note(step, "builtin", "seconds to start", start, **details)


if __name__ == "__main__":
    main()
