"""Labels for candidates: what each source means, and the candidates that training needs beside the sampled ones.

References are right and mismatches wrong on purpose: the references of other instances, drawn among the instances
given, which in the step are those of one part. `regression_rows` are what training reads of a labelled instance.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cappy.annotation.metrics import InstanceResponses, Metric, parse_metric
from cappy.annotation.rouge import is_partly_visible, is_visible, rouge_l_pools
from cappy.errors import RecordError, quote
from cappy.reasoning import has_reasoning
from cappy.records import Candidate, Instance
from cappy.records.instance import GIVEN, Source

Preset = Literal["default", "paper"]

NEARLY_RIGHT = 0.5
"""Rouge-L against the instance's own references from which a mismatch is not a wrong response."""
_SPARE_DRAWS = 4
"""Draws beyond those asked for, in case that some are nearly right."""


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How candidates are labelled: `metric` under the name of its label, and what is added beside the sampled ones."""

    name: str
    metric: Metric = field(repr=False)
    preset: Preset = "default"
    mismatches: int = 1
    seed: int = 0


def annotate(instances: Sequence[Instance], labelling: Labelling) -> Iterator[Instance]:
    """Instances with `labels[name]` on every candidate, references and mismatches added to their candidates.

    A reference is 1, a mismatch 0, a choice 1 if it is a reference and else 0, an LLM's response its metric (Cappy,
    §3.1). Where one text stands twice, training takes the first (see `regression_rows`): the reference, then what was
    sampled, then the mismatch; under the `paper` preset the mismatch before what was sampled.
    """
    _check_labelled(instances)
    kept = [[one for one in instance.candidates if one.source in ("llm", "choice")] for instance in instances]
    sampled = [[one for one in candidates if one.source == "llm"] for candidates in kept]
    metric = iter(
        labelling.metric([InstanceResponses(*pool) for pool in zip(instances, sampled, strict=True)]).tolist()
    )
    wrong = _draw_mismatches(instances, kept, labelling)
    for instance, candidates, texts in zip(instances, kept, wrong, strict=True):
        mismatches = [Candidate(response=text, source="mismatch") for text in texts]
        references = _references(instance, candidates, repeated=labelling.preset == "paper")
        middle = [*mismatches, *candidates] if labelling.preset == "paper" else [*candidates, *mismatches]
        labelled = (one.with_label(labelling.name, _label(one, instance, metric)) for one in (*references, *middle))
        yield replace(instance, candidates=tuple(labelled))


def count_facts(instances: Sequence[Instance], *, name: str, mismatches: int) -> Mapping[str, int]:
    """What a reader of the labels should know.

    `responses` are those of LLMs, `with_reasoning` those of them that hold more than an answer. `invisible_to_rougeL`
    are the instances none of whose references Rouge-L sees, `partly_invisible_to_rougeL` those with a reference or
    response of which it sees a part only, `mismatches_missing` mismatches that were not found.
    """
    by_rouge = "rougeL" in parse_metric(name)
    unseen = partly = 0
    for instance in instances if by_rouge else ():
        unseen += not any(map(is_visible, instance.references))
        texts = (candidate.response for candidate in instance.candidates if candidate.source == "llm")
        partly += any(map(is_partly_visible, instance.references)) or any(map(is_partly_visible, texts))
    responses = [one.response for instance in instances for one in instance.candidates if one.source == "llm"]
    open_ended = (instance.candidates for instance in instances if not instance.choices)
    drawn = (sum(candidate.source == "mismatch" for candidate in candidates) for candidates in open_ended)
    counts = {
        "responses": len(responses),
        "with_reasoning": sum(map(has_reasoning, responses)),
        "invisible_to_rougeL": unseen,
        "partly_invisible_to_rougeL": partly,
        "mismatches_missing": sum(max(0, mismatches - number) for number in drawn),
    }
    return {what: number for what, number in counts.items() if number}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An (instruction, response, label) of the regression set, with where the response came from.

    `source` (reference, choice, mismatch, llm), `generator` and `decoding` make every ablation of the paper a filter.
    """

    instance_id: str
    instruction: str
    response: str
    label: float
    source: Source
    generator: str = ""
    decoding: str = ""


def regression_rows(instance: Instance, metric: str) -> Iterator[Row]:
    """The instance's rows, duplicates dropped by response: the first one stands, so the order of candidates decides.

    References are all kept: those that stand twice were written so by the `paper` preset. RecordError where a
    candidate has no label of this metric.
    """
    seen: set[str] = set()
    for candidate in instance.candidates:
        if metric not in candidate.labels:
            remedy = "run cappy annotation on this folder first"
            raise RecordError(f"instance {quote(instance.instance_id)}: a candidate has no label {metric!r}; {remedy}")
        if candidate.response in seen and candidate.source != "reference":
            continue
        seen.add(candidate.response)
        yield Row(
            instance_id=instance.instance_id,
            instruction=instance.instruction,
            response=candidate.response,
            label=candidate.labels[metric],
            source=candidate.source,
            generator=candidate.generator,
            decoding=candidate.decoding,
        )


def _check_labelled(instances: Sequence[Instance]) -> None:
    """RecordError where nothing says what is correct: prepared to be scored, not to learn from."""
    for instance in instances:
        if not instance.references and not any(GIVEN in candidate.labels for candidate in instance.candidates):
            remedy = "prepare it with references and without --unlabelled"
            raise RecordError(f"instance {quote(instance.instance_id)}: has no reference to compare with; {remedy}")


def _label(candidate: Candidate, instance: Instance, metric: Iterator[float]) -> float:
    """The correctness of one candidate, 0 to 1, by its source; an LLM's is the next of the metric's values."""
    match candidate.source:
        case "reference":
            return 1.0
        case "mismatch":
            return 0.0
        case "choice":
            return float(candidate.response in instance.references)
        case _:
            return next(metric)


def _references(instance: Instance, kept: Sequence[Candidate], *, repeated: bool) -> list[Candidate]:
    """The references as candidates; a choice that is one already stands among the candidates."""
    choices = {candidate.response for candidate in kept if candidate.source == "choice"}
    texts = [reference for reference in instance.references if reference.strip() and reference not in choices]
    return [Candidate(response=text, source="reference") for text in (texts if repeated else dict.fromkeys(texts))]


def _draw_mismatches(
    instances: Sequence[Instance], kept: Sequence[Sequence[Candidate]], labelling: Labelling
) -> list[list[str]]:
    if labelling.preset == "paper":
        return _draw_as_published(instances, seed=labelling.seed)
    own = [
        {*instance.references, *(candidate.response for candidate in candidates)}
        for instance, candidates in zip(instances, kept, strict=True)
    ]
    return _draw_dissimilar(instances, own, count=labelling.mismatches, seed=labelling.seed)


def _draw_dissimilar(
    instances: Sequence[Instance], own: Sequence[set[str]], *, count: int, seed: int
) -> list[list[str]]:
    """For each instance up to `count` different references of others of its task and template.

    None is among its `own` texts, and none reaches `NEARLY_RIGHT`. An instance with choices gets none: its wrong
    choices are there already.
    """
    pools = _reference_pools(instances, lambda instance: (instance.task, instance.template))
    drawn: list[list[str]] = []
    for instance, texts in zip(instances, own, strict=True):
        pool = pools[instance.task, instance.template]
        wanted = 0 if instance.choices else min(len(pool), count and count + _SPARE_DRAWS)
        picks = random.Random(f"{seed} {instance.instance_id}").sample(pool, wanted)
        drawn.append([text for text in picks if text not in texts])
    values = iter(rouge_l_pools([instance.references for instance in instances], drawn).tolist())
    return [[text for text in texts if next(values) < NEARLY_RIGHT][:count] for texts in drawn]


def _draw_as_published(instances: Sequence[Instance], *, seed: int) -> list[list[str]]:
    """As the published code draws: for each reference one of all references of the task, right or wrong.

    One that is already a text of the instance is dropped and not drawn again (cappy_bigbench.py:31-37).
    """
    pools = _reference_pools(instances, lambda instance: instance.task)
    drawn = []
    for instance in instances:
        rng = random.Random(f"{seed} {instance.instance_id}")
        pool = pools[instance.task]
        picks = [] if instance.choices else [rng.choice(pool) for _ in instance.references]
        drawn.append([text for text in dict.fromkeys(picks) if text not in instance.references])
    return drawn


def _reference_pools(instances: Iterable[Instance], key: Callable[[Instance], Hashable]) -> dict[Hashable, list[str]]:
    """The different references of the instances of each key, in order."""
    pools: dict[Hashable, dict[str, None]] = {}
    for instance in instances:
        pools.setdefault(key(instance), {}).update(dict.fromkeys(filter(str.strip, instance.references)))
    return {name: list(texts) for name, texts in pools.items()}
