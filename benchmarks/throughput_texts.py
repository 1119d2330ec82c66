"""The texts that `throughput.py` measures with: prompts of T0's mixture, of held-out tasks, of the built-in tasks."""

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
from cappy.costing import Texts
from cappy.model_folder import open_model_folder
from cappy.preparation.mixtures import load_mixture
from cappy.preparation.mixtures.plan import plan
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.records import Candidate, Instance, read
from cappy.sampling.architectures import MAX_INSTRUCTION_TOKENS, Seq2Seq
from cappy.sampling.strategies import MAX_NEW_TOKENS, parse_strategy
from cappy.scoring.encoding import PairEncoder

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
T0 = SHARED / "t0/t0_train_50k.jsonl.xz"
TEMPLATES = SHARED / "templates/templates"
SAMPLES, LABELLED = 10, 2
"""Candidates of an open-ended prompt, and its reference with its mismatch."""
MOST = 300
"""Prompts of one kind of a subset whose lengths are measured, at most."""
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
"""Subset of the mixture -> the file with rows of it that are at hand."""

Prompt = dict[str, Any]


def t0_prompts() -> dict[tuple[str, str], list[Prompt]]:
    """Prompts at hand by subset and kind, in the file's order; those of other datasets are left out."""
    names = {subset.name for subset in load_mixture("t0").subsets}
    found: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    with lzma.open(T0, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["dataset"] in names and row["response"]:
                found[row["dataset"], "open-ended" if row["kind"] == "gen" else "choices"].append(row)
    return found


def t0_instances(prompts: dict[tuple[str, str], list[Prompt]], one_of: int) -> list[Instance]:
    """One of `one_of` prompts of the mixture, each subset and kind with its share, in a seeded order.

    Candidates of an open-ended prompt are references of other prompts of its subset, cut like an LLM's responses: no
    LLM of the mixture is at hand, and what is measured on them goes by their length.
    """
    wanted: dict[tuple[str, str], int] = defaultdict(int)
    for planned in plan(load_mixture("t0")).rows:
        wanted[planned.subset, planned.kind] += planned.examples or 0
    rng = random.Random(0)
    found = []
    for key, examples in sorted(wanted.items()):
        own = prompts.get(key, [])
        others = [row["response"] for row in own]
        for number, row in enumerate(rng.sample(own, min(len(own), round(examples / one_of)))):
            found.append(_instance(f"{key[0]} {key[1]} {number}", row, others, rng))
    rng.shuffle(found)
    return found


def _instance(name: str, row: Prompt, others: Sequence[str], rng: random.Random) -> Instance:
    choices = tuple(dict.fromkeys(row.get("answer_choices") or ()))
    drawn = [] if choices else rng.choices(others, k=SAMPLES)
    sampled = [
        Candidate(
            response=" ".join(text.split(" ")[: MAX_NEW_TOKENS * 3 // 4]),
            generator="bart0" if number < SAMPLES // 2 else "t0-3b",
            decoding="topk40" if number < SAMPLES // 2 else "topp0.95",
            seed=rng.randrange(2**31),
            logprob_sum=-rng.random() * 50,
            logprob_mean=-rng.random() * 5,
            num_tokens=len(text.split()),
        )
        for number, text in enumerate(drawn)
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
        candidates=tuple(Candidate(response=one, source="choice") for one in choices) or tuple(sampled),
    )


def t0_texts(prompts: dict[tuple[str, str], list[Prompt]], encoder: PairEncoder) -> Iterator[Texts]:
    """Lengths by subset and kind."""
    for (subset, kind), rows in sorted(prompts.items()):
        own = rows[:: max(1, len(rows) // MOST)][:MOST]
        asked = [(row["instruction"], row.get("answer_choices") or [row["response"]]) for row in own]
        yield lengths(subset, kind, asked, encoder)


def held_out_rows(folder: Path, rows: int) -> Iterator[tuple[str, Path]]:
    """Subset and a file of its first rows, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for subset, name in HELD_OUT.items():
        path = folder / f"{subset.replace('/', '-')}.jsonl"
        with gzip.open(SHARED / f"heldout_tasks/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            path.write_text("".join(islice(file, rows)), encoding="utf-8")
        yield subset, path


def render(subset: str, source: Path, folder: Path, rows: int) -> list[Instance]:
    """The prompts of a held-out subset's rows under all its templates, by the step itself."""
    dataset = next(one.dataset for one in load_mixture("heldout").subsets if one.name == subset)
    target = folder / f"prepared-{rows}" / source.stem
    preparation(
        PreparationConfig(
            source=str(source), target=target, templates=TEMPLATES, dataset=dataset, work=folder / "work",
            max_failed=1.0, test=0.0, validation=0.0,
        )
    )  # fmt: skip
    return list(read(target))


def held_out_texts(folder: Path, encoder: PairEncoder) -> Iterator[Texts]:
    """Lengths by subset, of the templates with choices alone."""
    for subset, path in held_out_rows(folder / "lengths", 40):
        own = [(one.instruction, list(one.choices)) for one in render(subset, path, folder, 40) if one.choices]
        yield lengths(subset, "choices", own, encoder)


def instance_texts(subset: str, instances: Iterable[Instance], encoder: PairEncoder) -> Iterator[Texts]:
    """Lengths by kind of instances with candidates; an open-ended one's responses are what an LLM sampled."""
    kinds: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for one in instances:
        drawn = [candidate.response for candidate in one.candidates if candidate.source == "llm"]
        kinds["choices" if one.choices else "open-ended"].append((one.instruction, list(one.choices) or drawn))
    for kind, asked in sorted(kinds.items()):
        yield lengths(subset, kind, asked, encoder)


def builtin_instances(per_family: int) -> list[Instance]:
    """Instances of the pretraining pool with 10 samples of the built-in LLM for each that is open-ended."""
    found = list(builtin_tasks(POOL, num_per_family=per_family, seed=1))
    opened = [one for one in found if not one.choices]
    decodings = parse_strategy(STRATEGY)
    drawn = Seq2Seq("builtin", open_model_folder(LLM_FOLDER)).sample(
        [one.instruction for one in opened], decodings, seed=1
    )
    own = {one.instance_id: tuple(some) for one, some in zip(opened, drawn, strict=True)}
    return [replace(one, candidates=own.get(one.instance_id, one.candidates)) for one in found]


def lengths(subset: str, kind: Any, asked: Sequence[tuple[str, Sequence[str]]], encoder: PairEncoder) -> Texts:
    """Lengths of prompts with their responses, every prompt weighing the same but in pairs.

    An open-ended prompt's pairs are its sampled responses, cut at what a generator writes, and two uncut ones: the
    reference and a mismatch.
    """
    prompts = [len(ids) for ids in encoder.tokens([prompt for prompt, _ in asked])]
    responses, pairs = [], []
    for prompt, (_, texts) in zip(prompts, asked, strict=True):
        whole = [len(ids) for ids in encoder.tokens(list(texts))]
        cut = [min(one, MAX_NEW_TOKENS) for one in whole]
        responses.append(fmean(cut))
        for short, long in zip(cut, whole, strict=True):
            for length, times in ((long, 1),) if kind == "choices" else ((short, SAMPLES), (long, LABELLED)):
                pairs += [min(encoder.max_length, prompt + length + encoder.num_special_tokens)] * times
    read_by_llm = [min(one, MAX_INSTRUCTION_TOKENS) for one in prompts]
    return Texts(
        subset=subset,
        kind=kind,
        prompts=len(prompts),
        prompt_tokens=round_digits(fmean(read_by_llm)),
        prompt_squared=round_digits(fmean(one**2 for one in read_by_llm)),
        response_tokens=round_digits(fmean(responses)),
        pair_tokens=round_digits(fmean(pairs)),
        pair_squared=round_digits(fmean(one**2 for one in pairs)),
    )


def round_digits(value: float) -> float:
    """Four digits, which is more than any of it is worth."""
    return float(f"{value:.4g}")
