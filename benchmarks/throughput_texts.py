"""Texts for `throughput.py`: prompts of T0's mixture, of the held-out tasks and of the built-in tasks."""

import gzip
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from builtin_steps import POOL, STRATEGY

from cappy.builtin import LLM_FOLDER
from cappy.builtin.tasks import instances as builtin_tasks
from cappy.costing import TextLengths
from cappy.model_folder import open_model_folder
from cappy.preparation.mixtures import load_mixture
from cappy.preparation.mixtures.plan import plan_mixture
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import Candidate, Instance, read
from cappy.sampling.architectures import MAX_INSTRUCTION_TOKENS, Seq2Seq
from cappy.sampling.strategies import MAX_NEW_TOKENS, parse_strategy
from cappy.scoring.encoding import PairEncoder

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
T0 = SHARED / "t0/t0_train_50k.jsonl.xz"
TEMPLATES = SHARED / "templates/templates"
NUM_SAMPLES, NUM_LABELLED = 10, 2
"""Sampled candidates of an open-ended prompt, and its reference and mismatch."""
MAX_PROMPTS = 300
"""Maximum number of prompts per subset and kind whose lengths are measured."""
HELD_OUT = {
    "anli/r1": "anli_r1.test",
    "anli/r2": "anli_r2.test",
    "hellaswag": "hellaswag.validation",
    "story_cloze/2016": "story_cloze_2016.validation",
    "super_glue/cb": "super_glue_cb.validation",
    "super_glue/rte": "super_glue_rte.validation",
    "super_glue/wic": "super_glue_wic.validation_500of638",
    "super_glue/wsc.fixed": "super_glue_wsc.fixed.validation",
    "winogrande/winogrande_xl": "winogrande_xl.validation",
}
"""Subset of the mixture -> the available file with its rows."""

Prompt = dict[str, Any]


def t0_prompts() -> dict[tuple[str, str], list[Prompt]]:
    """The available prompts of the mixture by (subset, kind), in file order."""
    names = {subset.name for subset in load_mixture("t0").subsets}
    prompts: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    with lzma.open(T0, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["dataset"] in names and row["response"]:
                prompts[row["dataset"], "open-ended" if row["kind"] == "gen" else "choices"].append(row)
    return prompts


def t0_instances(prompts: dict[tuple[str, str], list[Prompt]], one_of: int) -> list[Instance]:
    """One of `one_of` prompts of the mixture, in proportion to each subset and kind, in random order (seeded).

    Candidates of an open-ended prompt are references of other prompts of its subset, truncated like an LLM's responses:
    the mixture's LLMs are not available, and speed depends only on length.
    """
    num_examples: dict[tuple[str, str], int] = defaultdict(int)
    for planned in plan_mixture(load_mixture("t0")).rows:
        num_examples[planned.subset, planned.kind] += planned.examples or 0
    rng = random.Random(0)
    instances = []
    for key, examples in sorted(num_examples.items()):
        prompts_of_key = prompts.get(key, [])
        responses = [row["response"] for row in prompts_of_key]
        for number, row in enumerate(rng.sample(prompts_of_key, min(len(prompts_of_key), round(examples / one_of)))):
            instances.append(_instance(f"{key[0]} {key[1]} {number}", row, responses, rng))
    rng.shuffle(instances)
    return instances


def _instance(name: str, row: Prompt, responses: Sequence[str], rng: random.Random) -> Instance:
    choices = tuple(dict.fromkeys(row.get("answer_choices") or ()))
    texts = [] if choices else rng.choices(responses, k=NUM_SAMPLES)
    sampled = [
        Candidate(
            response=" ".join(text.split(" ")[: MAX_NEW_TOKENS * 3 // 4]),
            generator="bart0" if number < NUM_SAMPLES // 2 else "t0-3b",
            decoding="topk40" if number < NUM_SAMPLES // 2 else "topp0.95",
            seed=rng.randrange(2**31),
            logprob_sum=-rng.random() * 50,
            logprob_mean=-rng.random() * 5,
            num_tokens=len(text.split()),
        )
        for number, text in enumerate(texts)
    ]
    return Instance(
        instance_id=name,
        group_id=f"{row['dataset']} {row['row']}",
        task=row["dataset"],
        template=row["template"],
        split="validation" if rng.random() < 0.02 else "train",
        instruction=row["instruction"],
        references=(row["response"],),
        choices=choices,
        candidates=tuple(Candidate(response=choice, source="choice") for choice in choices) or tuple(sampled),
    )


def t0_lengths(prompts: dict[tuple[str, str], list[Prompt]], encoder: PairEncoder) -> Iterator[TextLengths]:
    """Text lengths by subset and kind."""
    for (subset, kind), rows in sorted(prompts.items()):
        sampled_rows = rows[:: max(1, len(rows) // MAX_PROMPTS)][:MAX_PROMPTS]
        pairs = [(row["instruction"], row.get("answer_choices") or [row["response"]]) for row in sampled_rows]
        yield measure_lengths(subset, kind, pairs, encoder)


def held_out_rows(folder: Path, rows: int) -> Iterator[tuple[str, Path]]:
    """(subset, file with its first `rows` rows) pairs; files are written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for subset, name in HELD_OUT.items():
        path = folder / f"{subset.replace('/', '-')}.jsonl"
        with gzip.open(SHARED / f"heldout_tasks/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            path.write_text("".join(islice(file, rows)), encoding="utf-8")
        yield subset, path


def render(subset: str, source: Path, folder: Path, rows: int) -> list[Instance]:
    """The instances of a held-out subset's rows with all its templates, by the preparation step."""
    dataset = next(entry.dataset for entry in load_mixture("heldout").subsets if entry.name == subset)
    target = folder / f"prepared-{rows}" / source.stem
    preparation(
        PreparationConfig(
            source=str(source), target=target, templates=TEMPLATES, dataset=dataset, work=folder / "work",
            max_failed=1.0, test=0.0, validation=0.0,
        )
    )  # fmt: skip
    return list(read(target))


def held_out_lengths(folder: Path, encoder: PairEncoder) -> Iterator[TextLengths]:
    """Text lengths by subset, of templates with choices."""
    for subset, path in held_out_rows(folder / "lengths", 40):
        pairs = [
            (instance.instruction, list(instance.choices))
            for instance in render(subset, path, folder, 40)
            if instance.choices
        ]
        yield measure_lengths(subset, "choices", pairs, encoder)


def instance_lengths(subset: str, instances: Iterable[Instance], encoder: PairEncoder) -> Iterator[TextLengths]:
    """Text lengths by kind of instances with candidates; responses of open-ended ones are their LLM samples."""
    kinds: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for instance in instances:
        responses = [candidate.response for candidate in instance.candidates if candidate.source == "llm"]
        kinds["choices" if instance.choices else "open-ended"].append(
            (instance.instruction, list(instance.choices) or responses)
        )
    for kind, pairs in sorted(kinds.items()):
        yield measure_lengths(subset, kind, pairs, encoder)


def builtin_instances(per_family: int) -> list[Instance]:
    """Instances of the pretraining pool, the open-ended ones with 10 samples of the built-in LLM."""
    instances = list(builtin_tasks(POOL, num_per_family=per_family, seed=1))
    open_ended = [instance for instance in instances if not instance.choices]
    decodings = parse_strategy(STRATEGY)
    candidates = Seq2Seq("builtin", open_model_folder(LLM_FOLDER)).sample(
        [instance.instruction for instance in open_ended], decodings, seed=1
    )
    candidates_by_id = {
        instance.instance_id: tuple(group) for instance, group in zip(open_ended, candidates, strict=True)
    }
    return [
        replace(instance, candidates=candidates_by_id.get(instance.instance_id, instance.candidates))
        for instance in instances
    ]


def measure_lengths(
    subset: str, kind: Any, texts_of_prompts: Sequence[tuple[str, Sequence[str]]], encoder: PairEncoder
) -> TextLengths:
    """Mean lengths of prompts and responses, over prompts, and of pairs, over pairs.

    The pairs of an open-ended prompt are its sampled responses, truncated to the maximum of a generator, and two full
    ones: the reference and a mismatch.
    """
    prompts = [len(ids) for ids in encoder.tokenize([prompt for prompt, _ in texts_of_prompts])]
    responses, pairs = [], []
    for prompt, (_, texts) in zip(prompts, texts_of_prompts, strict=True):
        full_lengths = [len(ids) for ids in encoder.tokenize(list(texts))]
        cut_lengths = [min(length, MAX_NEW_TOKENS) for length in full_lengths]
        responses.append(fmean(cut_lengths))
        for short, long in zip(cut_lengths, full_lengths, strict=True):
            for length, times in ((long, 1),) if kind == "choices" else ((short, NUM_SAMPLES), (long, NUM_LABELLED)):
                pairs += [min(encoder.max_length, prompt + length + encoder.num_special_tokens)] * times
    read_by_llm = [min(length, MAX_INSTRUCTION_TOKENS) for length in prompts]
    return TextLengths(
        subset=subset,
        kind=kind,
        prompts=len(prompts),
        prompt_tokens=round_digits(fmean(read_by_llm)),
        prompt_squared=round_digits(fmean(length**2 for length in read_by_llm)),
        response_tokens=round_digits(fmean(responses)),
        pair_tokens=round_digits(fmean(pairs)),
        pair_squared=round_digits(fmean(length**2 for length in pairs)),
    )


def round_digits(value: float) -> float:
    """Rounds to four significant digits."""
    return float(f"{value:.4g}")
