"""Trains the built-in models, records samples of a real LLM, and draws prompts of T0's mixture.

    python -m cappy.builtin llm --target cappy/builtin/weights/llm
    python -m cappy.builtin scorer --target cappy/builtin/weights/tiny
    python -m cappy.builtin samples --target cappy/builtin/samples --llm FOLDER --gsm8k FILE --commongen FILE
    python -m cappy.builtin prompts --target prompts.jsonl --t0 FILE

The scorer is pretrained on samples of the built-in LLM, so train the LLM first. If the training of the scorer or the
sampling is interrupted, the same command resumes it.
"""

import argparse
import gzip
import json
import lzma
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypedDict

from cappy.records import Instance

_MAX_LENGTH = 256
_LEARNING_RATE = 1e-3
_BATCH_TOKENS = 1024
"""Small enough to keep the activations in cache: 160 pairs/s on one core, 125 with 2,048 (one trial)."""

_RECORDED_FAMILIES = (
    *("word_sorting", "list_reversal", "list_selection", "word_editing", "tense_change", "passive_voice"),
    *("number_words", "date_formats", "restaurant_description", "person_description"),
)
_RECORDED_STRATEGY, _RECORDED_TOKENS = "greedy+topp0.95x7", 40
_RECORDED_FILES = {"demo": 22, "more": 34}
"""File of recorded samples -> its instances of each built-in family; CommonGen and GSM8K have twice as many each."""
_T0_EXCLUDED = ("common_gen", "imdb", "rotten_tomatoes", "dbpedia_14", "wiki_qa")
"""Datasets not to draw: benchmarks test on the first; the file has nearly only one answer of each of the others."""
_T0_MAX_WORDS = 180
"""Words of an instruction that fit into 256 tokens with a response."""


def main() -> None:
    """Parses the command line and trains the model."""
    parser = argparse.ArgumentParser(
        prog="python -m cappy.builtin", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    llm = commands.add_parser("llm", help="train the very small LLM on the built-in tasks")
    llm.add_argument("--target", type=Path, required=True, help="folder to write; its files are overwritten")
    llm.add_argument("--steps", type=int, default=3000, help="updates of the weights")
    llm.add_argument("--processes", type=int, default=2, help="processes that share each batch, one thread each")
    llm.add_argument("--seed", type=int, default=0)
    llm.add_argument("--num-per-family", type=int, default=8_000, help="instances to draw from each family")
    scorer = commands.add_parser("scorer", help="pretrain the very small scorer on samples of the LLM")
    scorer.add_argument("--target", type=Path, required=True, help="folder to write")
    scorer.add_argument("--num-per-family", type=int, default=1_000, help="instances to draw from each family")
    scorer.add_argument("--epochs", type=float, default=4.0, help="passes over the instances")
    scorer.add_argument("--seed", type=int, default=0)
    scorer.add_argument("--work", type=Path, default=Path(".cappy/builtin"), help="folder to resume from")
    samples = commands.add_parser("samples", help="record the samples of a real LLM")
    samples.add_argument("--target", type=Path, required=True, help="folder to write")
    samples.add_argument("--llm", type=Path, required=True, help="folder of the LLM")
    samples.add_argument("--name", default="qwen2.5-coder-0.5b-instruct", help="name of the LLM in the files")
    samples.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's training split, gzipped JSON Lines")
    samples.add_argument("--commongen", type=Path, required=True, help="CommonGen's training split, the same")
    samples.add_argument("--seed", type=int, default=0)
    samples.add_argument("--work", type=Path, default=Path(".cappy/builtin"), help="folder to resume from")
    prompts = commands.add_parser("prompts", help="draw prompts of T0's training mixture for pretraining")
    prompts.add_argument("--target", type=Path, required=True, help="JSON Lines file to write")
    prompts.add_argument("--t0", type=Path, required=True, help="rendered prompts of the mixture, .jsonl.xz")
    prompts.add_argument("--choice", type=int, default=5_000, help="prompts with choices")
    prompts.add_argument("--generation", type=int, default=1_500, help="prompts without choices")
    prompts.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    commands_by_name = {
        "llm": _train_llm,
        "scorer": _pretrain_scorer,
        "samples": _record_samples,
        "prompts": _draw_prompts,
    }
    commands_by_name[arguments.command](arguments)


def _train_llm(arguments: argparse.Namespace) -> None:
    from cappy.builtin.llm import TrainingJob, train_llm

    train_llm(
        TrainingJob(
            target=arguments.target,
            steps=arguments.steps,
            processes=arguments.processes,
            seed=arguments.seed,
            num_per_family=arguments.num_per_family,
        )
    )


class _CommonSettings(TypedDict):
    """Settings common to all steps."""

    seed: int
    work: Path


def _pretrain_scorer(arguments: argparse.Namespace) -> None:
    """Samples responses of the built-in LLM on the pretraining pool, labels them and pretrains; steps can resume."""
    from cappy.annotation.step import AnnotationConfig
    from cappy.annotation.step import run as annotation
    from cappy.preparation.step import PreparationConfig
    from cappy.preparation.step import run as preparation
    from cappy.sampling.step import SamplingConfig
    from cappy.sampling.step import run as sampling
    from cappy.training.pretraining import PretrainingConfig
    from cappy.training.pretraining import run as pretraining

    prepared_folder, sampled_folder, annotated_folder = (
        arguments.work / name for name in ("prepared", "sampled", "annotated")
    )
    common_settings: _CommonSettings = {"seed": arguments.seed, "work": arguments.work}
    preparation_config = PreparationConfig(
        target=prepared_folder, pool="pretraining", num_per_family=arguments.num_per_family, **common_settings
    )
    preparation(preparation_config, _progress)
    sampling_config = SamplingConfig(
        source=prepared_folder, target=sampled_folder, generator=("builtin",), strategy="sampling8", **common_settings
    )
    sampling(sampling_config, _progress)
    annotation(AnnotationConfig(source=sampled_folder, target=annotated_folder, **common_settings), _progress)
    pretraining_config = PretrainingConfig(
        source=annotated_folder,
        target=arguments.target,
        max_length=_MAX_LENGTH,
        epochs=arguments.epochs,
        learning_rate=_LEARNING_RATE,
        batch_tokens=_BATCH_TOKENS,
        batch_instances=16,
        max_candidates=16,
        # The weights of the relative and of the listwise loss.
        relative=4.0,
        listwise=0.0,
        patience=100,
        **common_settings,
    )
    manifest = pretraining(pretraining_config, _progress)
    sys.stderr.write(f"{dict(manifest.metrics)}\n")


def _record_samples(arguments: argparse.Namespace) -> None:
    """Writes demo.jsonl.gz and more.jsonl.gz: instances with the samples of an LLM and their likelihoods."""
    from cappy.preparation.step import PreparationConfig
    from cappy.preparation.step import run as preparation
    from cappy.records import read
    from cappy.sampling.step import SamplingConfig
    from cappy.sampling.step import run as sampling

    prompts = _prompts(arguments.gsm8k, arguments.commongen, arguments.seed)
    common: _CommonSettings = {"seed": arguments.seed, "work": arguments.work}
    for name, num_per_family in _RECORDED_FILES.items():
        folder = arguments.work / name
        folder.mkdir(parents=True, exist_ok=True)
        counts = {task: num_per_family * (1 if task in _RECORDED_FAMILIES else 2) for task in prompts}
        rows = [row for task, count in counts.items() for row in islice(prompts[task], count)]
        if len(rows) < sum(counts.values()):
            sys.exit(
                f"{name}: GSM8K and CommonGen give only {len(rows)} of {sum(counts.values())} prompts; check the files"
            )
        source = folder / "prompts.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        preparation(
            PreparationConfig(source=str(source), target=folder / "prepared", test=0, validation=0, **common), _progress
        )
        sampling(
            SamplingConfig(
                source=folder / "prepared",
                target=folder / "sampled",
                generator=(str(arguments.llm),),
                strategy=_RECORDED_STRATEGY,
                max_new_tokens=_RECORDED_TOKENS,
                **common,
            ),
            _progress,
        )
        lines = (json.dumps(_sample_row(each, arguments.name), ensure_ascii=False) for each in read(folder / "sampled"))
        arguments.target.mkdir(parents=True, exist_ok=True)
        # Without a time and a name in its header, the same samples give the same bytes.
        text = "".join(f"{line}\n" for line in lines)
        (arguments.target / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def _prompts(gsm8k: Path, commongen: Path, seed: int) -> dict[str, Iterator[dict[str, object]]]:
    """Task -> its prompts in a random order; consecutive draws have no row in common."""
    from cappy.builtin.tasks import instances

    total = sum(_RECORDED_FILES.values())
    by_task: dict[str, list[dict[str, object]]] = defaultdict(list)
    for instance in instances("adaptation", num_per_family=total, seed=seed, families=_RECORDED_FAMILIES):
        by_task[instance.task].append(_prompt_row(instance.task, instance.instruction, instance.references, "answer"))
    with gzip.open(gsm8k, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            number = row["answer"].rpartition("####")[2].strip().replace(",", "")
            by_task["gsm8k"].append(_prompt_row("gsm8k", row["question"], (number,), "number"))
    sentences: dict[tuple[str, ...], list[str]] = defaultdict(list)
    with gzip.open(commongen, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            sentences[tuple(row["concepts"])].append(row["target"])
    for concepts, references in sentences.items():
        if len(references) > 1:
            text = f"Write one sentence with all of these words: {', '.join(concepts)}"
            by_task["commongen"].append(_prompt_row("commongen", text, tuple(references), "sentence"))
    for task in ("gsm8k", "commongen"):
        Random(f"{seed}/{task}").shuffle(by_task[task])
    return {task: iter(rows) for task, rows in by_task.items()}


def _prompt_row(task: str, text: str, references: tuple[str, ...], kind: str) -> dict[str, object]:
    return {"task": task, "instruction": f"{text}\nAnswer with the {kind} only.", "references": references}


def _sample_row(instance: Instance, llm: str) -> dict[str, object]:
    """An instance with its samples as a line that preparation and `recorded:` read."""
    candidates = [
        {
            "system": f"{llm} {candidate.decoding}",
            "text": candidate.response,
            "logprob_sum": None if candidate.logprob_sum is None else round(candidate.logprob_sum, 4),
            "num_tokens": candidate.num_tokens,
            **({} if candidate.status == "ok" else {"status": candidate.status}),
        }
        for candidate in instance.candidates
    ]
    return {
        "id": instance.instance_id,
        "task": instance.task,
        "instruction": instance.instruction,
        "references": list(instance.references),
        "candidates": candidates,
    }


def _draw_prompts(arguments: argparse.Namespace) -> None:
    """Writes prompts of T0's training mixture, as many of each dataset as of the others where it has so many."""
    by_kind: dict[str, dict[str, list[dict[str, object]]]] = {
        "choice": defaultdict(list),
        "generation": defaultdict(list),
    }
    with lzma.open(arguments.t0, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            choices = row.get("answer_choices") or []
            is_choice = row["response"] in choices
            if row["dataset"] in _T0_EXCLUDED or len(row["instruction"].split()) > _T0_MAX_WORDS:
                continue
            by_kind["choice" if is_choice else "generation"][row["dataset"]].append(
                {
                    "instruction": row["instruction"],
                    "references": [row["response"]],
                    "choices": choices if is_choice else [],
                    "task": row["dataset"],
                    "template": row["template"],
                    "group_id": f"{row['dataset']} {row['row']}",
                }
            )
    drawn = [
        row
        for kind, count in (("choice", arguments.choice), ("generation", arguments.generation))
        for row in _draw_evenly(by_kind[kind], count, Random(f"{arguments.seed}/{kind}"))
    ]
    if len(drawn) < arguments.choice + arguments.generation:
        sys.stderr.write(f"{arguments.t0}: has only {len(drawn)} prompts of the requested kinds\n")
    arguments.target.write_text("".join(json.dumps(row) + "\n" for row in drawn), encoding="utf-8")


def _draw_evenly(
    rows: Mapping[str, list[dict[str, object]]], count: int, generator: Random
) -> Iterator[dict[str, object]]:
    """At most `count` rows, in rotation over the names."""
    shuffled = [generator.sample(values, len(values)) for _, values in sorted(rows.items())]
    rounds = (
        values[index]
        for index in range(max(map(len, shuffled), default=0))
        for values in shuffled
        if index < len(values)
    )
    return islice(rounds, count)


def _progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
    sys.stderr.write(f"\r{done}/{total} {unit}   ")


if __name__ == "__main__":
    main()
