"""A step's version stands for its results: where they change on this small fixture, the version must be raised.

Work is kept and found again by the version (`cappy.steps`), so a change of results under the same version would serve
old work as new. Of preparation, annotation and gathering the content is compared; of steps that compute with floats
the numbers, within a tolerance, because they differ by processor. After raising a version in cappy/steps.py:

    CAPPY_GOLDEN=write .venv/bin/python -m pytest tests/test_step_versions.py

Registration, promotion and deployment are not here: they ask a registry each time and answer nothing from a key.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import cappy
from cappy.records import Candidate, Instance, read, write
from cappy.steps import STEP_SPECS, step_version
from cappy.worker import config_class, runner

GOLDEN = Path(__file__).parent / "golden" / "step_versions.json"
ROOT = Path(cappy.__file__).parent
DATA = {
    "preparation": ("preparation/mixtures/data/*.json", "preparation/templates/hashes.json"),
    "sampling": ("builtin/weights/llm/*",),
    "scoring": ("builtin/weights/tiny/*",),
    "evaluation": ("evaluation/data/*.json", "evaluation/*.jinja", "pages/*.jinja"),
}
"""Files of the package that decide what a step writes."""
TOLERANCE = 2e-3
METRICS = ("rougeL", "exact_match", "numeric_match", "token_f1", "chrf", "bleu", "0.5*rougeL+0.5*exact_match")
WORDS = ("red pear", "blue plum", "green fig", "ripe lime", "small date", "sweet melon")
PAIRS = [("Name a fruit that is red.", text) for text in (*WORDS, "", "The answer is 12.")]


def labelled(count: int = 36) -> Iterator[Instance]:
    """Instances of two tasks in all splits, whose labels follow from which word a response has."""
    for number in range(count):
        right = WORDS[number % len(WORDS)]
        texts = [right, WORDS[(number + 1) % len(WORDS)], f"{right} and {WORDS[(number + 2) % len(WORDS)]}", "none"]
        labels = (1.0, 0.0, 0.5, 0.25 * (number % 3))
        yield Instance(
            instance_id=f"i{number}",
            group_id=f"g{number}",
            task=("fruit", "colour")[number % 2],
            split=("train", "validation", "test")[number % 3],
            instruction=f"Say the fruit of number {number}: {right}?",
            references=(right,),
            candidates=tuple(
                Candidate(
                    response=text,
                    source="llm",
                    generator="made",
                    decoding="temperature0" if place == 2 else "sampling",
                    logprob_sum=-1.0 - place - number % 5,
                    logprob_mean=-(1.0 + place) / 4,
                    num_tokens=4,
                    labels={"rougeL": label},
                )
                for place, (text, label) in enumerate(zip(texts, labels, strict=True))
            ),
        )


def odd_rows() -> Iterator[Instance]:
    """What metrics and labels treat differently: numbers, choices, several references, blanks, other scripts."""
    cases: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = [
        ("What is 6 times 7?", ("42",), (), ("The answer is 42.", "41", "forty-two", "$42.00", "1,042")),
        ("Is water wet?", ("yes",), ("yes", "no"), ("Yes.", "no")),
        ("Name two fruits.", ("pear and fig", "figs, pears"), (), ("Figs and pears!", "pears", " ")),
        ("Translate: house", ("das Haus", "Häuser"), (), ("Das Haus.", "ein Häuschen")),
        ("说一个水果", ("苹果",), (), ("苹果", "一个苹果")),
        ("Sum up.", ("The cat sat on the mat.",), (), ("the cats sat on mats", "A dog ran.")),
    ]
    for number, (instruction, references, choices, responses) in enumerate(cases):
        yield Instance(
            instance_id=str(number),
            instruction=instruction,
            references=references,
            choices=choices,
            candidates=tuple(Candidate(response=text, source="llm", generator="g") for text in responses),
        )


def content(folder: Path) -> str:
    """sha256 over the records of a folder, in their order."""
    digest = hashlib.sha256()
    for instance in read(folder):
        digest.update(json.dumps(asdict(instance), sort_keys=True, default=str).encode())
    return digest.hexdigest()


class Runner:
    """Runs steps in a folder of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._number = 0

    def __call__(self, step: str, **settings: Any) -> Path:
        self._number += 1
        target = self.place / f"{step}-{self._number}"
        config = config_class(step)(**{**settings, "target": target, "work": self.place / "work"})
        runner(step)(config, lambda *_, **__: None)
        return target

    def written(self, name: str, instances: Iterator[Instance]) -> Path:
        """A folder of these instances."""
        write(self.place / name, instances)
        return self.place / name


def preparation(run: Runner) -> dict[str, Any]:
    rows = [{"q": f"Say {n}.", "a": str(n), "said": [str(n), "none"], "who": f"p{n // 2}"} for n in range(12)]
    (run.place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run.place / "rows.csv").write_text(
        "instruction,response,reference,group_id\n"
        + "".join(f"Add {n // 2} and 1.,{n},{n // 2 + 1},g{n // 2}\n" for n in range(12))
    )
    likelihoods: list[dict[str, float]] = [
        {"logprob_sum": -3.0, "num_tokens": 4}, {"logprob_mean": -0.5, "num_tokens": 6}, {"logprob_sum": -1.0}
    ]  # fmt: skip
    sampled = [{"text": f"yes {n}", "system": "m greedy", **values} for n, values in enumerate(likelihoods)]
    (run.place / "sampled.jsonl").write_text(
        "\n".join(json.dumps({"instruction": f"Ask {n}.", "reference": "yes", "candidates": sampled}) for n in range(6))
    )
    (run.place / "task.json").write_text(
        json.dumps(
            {
                "name": "fruits",
                "description": "d",
                "keywords": ["k"],
                "metrics": ["multiple_choice_grade"],
                "examples": [{"input": f"Is {word} red?", "target_scores": {"yes": 1, "no": 0}} for word in WORDS],
            }
        )
    )
    columns = ("instruction=q", "reference=a", "responses=said", "group_id=who")
    return {
        "builtin": content(run("preparation", source="builtin", num_per_family=3)),
        "pretraining pool": content(run("preparation", source="builtin", num_per_family=3, pool="pretraining", seed=1)),
        "JSON Lines": content(run("preparation", source=str(run.place / "rows.jsonl"), columns=columns)),
        "CSV": content(run("preparation", source=str(run.place / "rows.csv"), seed=2)),
        "candidates": content(run("preparation", source=str(run.place / "sampled.jsonl"))),
        "BIG-bench": content(run("preparation", source=str(run.place / "task.json"))),
        "records": content(run("preparation", source=str(run.written("made", labelled(6))))),
    }


def sampling(run: Runner) -> dict[str, Any]:
    source = run("preparation", source="builtin", num_per_family=1, families=("date_formats", "word_sorting"))
    target = run("sampling", source=source, generator=("builtin",), strategy="greedy+topk40x2+beam2", seed=3)
    drawn = [one for instance in read(target) for one in instance.candidates if one.source == "llm"]
    return {
        "decodings": [one.decoding for one in drawn],
        "responses": [one.response for one in drawn],
        "likelihoods": [one.logprob_mean for one in drawn],
    }


def annotation(run: Runner) -> dict[str, Any]:
    odd = run.written("odd", odd_rows())
    result = {metric: content(run("annotation", source=odd, metric=metric)) for metric in METRICS}
    return {**result, "paper": content(run("annotation", source=odd, preset="paper", seed=1))}


def scoring(run: Runner) -> dict[str, Any]:
    target = run("scoring", source=run.written("pool", labelled(8)), scorer="builtin:tiny", precision="fp32")
    return {"scores": [next(iter(one.scores.values())) for each in read(target) for one in each.candidates]}


def gathering(run: Runner) -> dict[str, Any]:
    pool = run.written("whole", labelled(9))
    shards = tuple(run("annotation", source=pool, metric="chrf", shard=f"{number}/3") for number in range(3))
    return {"records": content(run("gathering", source=shards))}


def _scores(folder: Path) -> list[float]:
    from cappy.scoring import Scorer

    return Scorer.load(str(folder), precision="fp32").score(PAIRS)


def _trained(run: Runner, step: str, **settings: Any) -> dict[str, Any]:
    more = {"epochs": 1.0, "batch_instances": 4, "seed": 5, **settings}
    return {"scores": _scores(run(step, source=run.written("labelled", labelled()), **more))}


def pretraining(run: Runner) -> dict[str, Any]:
    return _trained(run, "pretraining", encoder="builtin", layers=1, hidden_size=32, learning_rate=1e-3)


def finetuning(run: Runner) -> dict[str, Any]:
    return _trained(run, "finetuning", scorer="builtin:tiny", learning_rate=1e-4)


def evaluation(run: Runner) -> dict[str, Any]:
    from cappy.builtin import TINY_SCORER_FOLDER

    scorer = run.place / "scorer"
    shutil.copytree(TINY_SCORER_FOLDER, scorer)
    report = run("evaluation", source=run.written("judged", labelled(120)), scorer=scorer, seed=1)
    values = json.loads((report / "report.json").read_text())
    return {"selectors": values["selectors"], "comparisons": values["comparisons"], "best of n": values["curve"]}


STEPS: dict[str, Callable[[Runner], dict[str, Any]]] = {
    step.__name__: step
    for step in (preparation, sampling, annotation, scoring, gathering, pretraining, finetuning, evaluation)
}


def differences(now: Any, before: Any, where: str = "") -> Iterator[str]:
    """Where two results differ by more than the tolerance."""
    if isinstance(now, float) and isinstance(before, int | float):
        if not math.isclose(now, before, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{where}: {before} -> {now}"
    elif isinstance(now, dict) and isinstance(before, dict):
        for name in sorted({*now, *before}):
            yield from differences(now.get(name), before.get(name), f"{where}.{name}".strip("."))
    elif isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        for number, (one, other) in enumerate(zip(now, before, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif now != before:
        yield f"{where}: {before!r} -> {now!r}"


def package_data(step: str) -> str:
    """sha256 over the package's files that decide what the step writes."""
    digest = hashlib.sha256()
    for pattern in DATA.get(step, ()):
        paths = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        assert paths, f"{pattern}: no such file of the package"
        for path in paths:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def test_every_step_that_answers_from_a_key_is_held() -> None:
    assert {*STEPS} == {name for name, spec in STEP_SPECS.items() if spec.cached}


@pytest.mark.parametrize("step", STEPS)
def test_results_change_only_with_the_steps_version(step: str, tmp_path: Path) -> None:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    results = json.loads(json.dumps(STEPS[step](Runner(tmp_path))))
    now = {"version": step_version(step), "package data": package_data(step), "results": results}
    before = golden.get(step, {})
    if os.environ.get("CAPPY_GOLDEN") == "write" and now["version"] != before.get("version"):
        GOLDEN.write_text(json.dumps({**golden, step: now}, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        return
    assert now["version"] == before.get("version"), f"{step} has a new version: write its results, as above"
    result = list(differences(now, before))
    remedy = f"raise the version of {step} in cappy/steps.py, and of any other step that this test names"
    assert not result, f"{step}: other results under the same version; {remedy}: {result[:5]}"
