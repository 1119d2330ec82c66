"""Labels candidates by their source, and adds the candidates that training needs besides the sampled ones.

These are the references (correct) and mismatches (wrong): references of other instances, drawn among the instances of
the same part. `regression_rows` yields the training rows of a labelled instance.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cappy.annotation.metrics import CandidatePool, Metric, parse_metric
from cappy.annotation.rouge import is_partly_visible, is_visible, rouge_l_pools
from cappy.errors import RecordError, quote
from cappy.reasoning import has_reasoning
from cappy.records import Candidate, Instance
from cappy.records.instance import GIVEN_METRIC, Source

Preset = Literal["default", "paper"]

MAX_MISMATCH_ROUGE = 0.5
"""A mismatch must have a lower Rouge-L than this against the instance's own references."""
_EXTRA_DRAWS = 4
"""Additional draws, because some mismatches may be rejected."""


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How candidates are labelled: the metric with the name of its label, and which candidates are added."""

    name: str
    metric: Metric = field(repr=False)
    preset: Preset = "default"
    mismatches: int = 1
    seed: int = 0


def annotate(instances: Sequence[Instance], labelling: Labelling) -> Iterator[Instance]:
    """Yields the instances with references and mismatches as further candidates, and `labels[name]` on each candidate.

    The label of a reference is 1, of a mismatch 0, of a choice 1 if it is a reference and else 0, and of an LLM's
    response the value of the metric (Cappy, §3.1). Candidates are ordered: references, sampled responses, mismatches
    (with the `paper` preset: references, mismatches, sampled responses). If a text occurs twice, training uses the
    first (see `regression_rows`). Raises RecordError if an instance has neither references nor given labels.
    """
    _check_can_be_labelled(instances)
    own_candidates = [
        [each for each in instance.candidates if each.source in ("llm", "choice")] for instance in instances
    ]
    sampled = [[each for each in candidates if each.source == "llm"] for candidates in own_candidates]
    pools = [CandidatePool(*pool) for pool in zip(instances, sampled, strict=True)]
    metric_values = iter(labelling.metric(pools).tolist())
    mismatch_texts = _draw_mismatches(instances, own_candidates, labelling)
    for instance, candidates, texts in zip(instances, own_candidates, mismatch_texts, strict=True):
        mismatches = [Candidate(response=text, source="mismatch") for text in texts]
        references = _references(instance, candidates, repeated=labelling.preset == "paper")
        others = [*mismatches, *candidates] if labelling.preset == "paper" else [*candidates, *mismatches]
        labelled = (
            each.with_label(labelling.name, _label(each, instance, metric_values)) for each in (*references, *others)
        )
        yield replace(instance, candidates=tuple(labelled))


def count_facts(instances: Sequence[Instance], *, name: str, mismatches: int) -> Mapping[str, int]:
    """Counts of properties that limit the use of the labels; zero counts are left out.

    `responses` counts LLM responses, `with_reasoning` those that contain reasoning. `invisible_to_rougeL` counts
    instances whose references have no token for Rouge-L, `partly_invisible_to_rougeL` those with a reference or
    response in which Rouge-L ignores some letters or digits, `mismatches_missing` the mismatches that could not be
    drawn.
    """
    by_rouge = "rougeL" in parse_metric(name)
    num_invisible = num_partly_invisible = 0
    for instance in instances if by_rouge else ():
        num_invisible += not any(map(is_visible, instance.references))
        texts = (candidate.response for candidate in instance.candidates if candidate.source == "llm")
        num_partly_invisible += any(map(is_partly_visible, instance.references)) or any(map(is_partly_visible, texts))
    responses = [each.response for instance in instances for each in instance.candidates if each.source == "llm"]
    open_ended = (instance.candidates for instance in instances if not instance.choices)
    num_drawn = (sum(candidate.source == "mismatch" for candidate in candidates) for candidates in open_ended)
    counts = {
        "responses": len(responses),
        "with_reasoning": sum(map(has_reasoning, responses)),
        "invisible_to_rougeL": num_invisible,
        "partly_invisible_to_rougeL": num_partly_invisible,
        "mismatches_missing": sum(max(0, mismatches - number) for number in num_drawn),
    }
    return {name: number for name, number in counts.items() if number}


@dataclass(frozen=True, slots=True, kw_only=True)
class RegressionRow:
    """An (instruction, response, label) of the regression set, with the origin of the response.

    `source` (reference, choice, mismatch, llm), `generator` and `decoding` allow the paper's ablations by filtering.
    """

    instance_id: str
    instruction: str
    response: str
    label: float
    source: Source
    generator: str = ""
    decoding: str = ""


def regression_rows(instance: Instance, label_name: str) -> Iterator[RegressionRow]:
    """Yields the instance's rows; of candidates with the same response, only the first one is used.

    References are never dropped: the `paper` preset repeats them. Raises RecordError if a candidate has no label with
    this name, which is that of a metric.
    """
    seen: set[str] = set()
    for candidate in instance.candidates:
        if label_name not in candidate.labels:
            remedy = "run cappy annotation on this folder first"
            where = f"instance {quote(instance.instance_id)}"
            raise RecordError(f"{where}: a candidate has no label {label_name!r}; {remedy}")
        if candidate.response in seen and candidate.source != "reference":
            continue
        seen.add(candidate.response)
        yield RegressionRow(
            instance_id=instance.instance_id,
            instruction=instance.instruction,
            response=candidate.response,
            label=candidate.labels[label_name],
            source=candidate.source,
            generator=candidate.generator,
            decoding=candidate.decoding,
        )


def _check_can_be_labelled(instances: Sequence[Instance]) -> None:
    """Raises RecordError if an instance has neither references nor given labels."""
    for instance in instances:
        if not instance.references and not any(GIVEN_METRIC in candidate.labels for candidate in instance.candidates):
            remedy = "prepare it with references and without --unlabelled"
            raise RecordError(f"instance {quote(instance.instance_id)}: has no reference to compare with; {remedy}")


def _label(candidate: Candidate, instance: Instance, metric_values: Iterator[float]) -> float:
    """The correctness of one candidate, 0 to 1, by its source; for an LLM's response the next metric value."""
    match candidate.source:
        case "reference":
            return 1.0
        case "mismatch":
            return 0.0
        case "choice":
            return float(candidate.response in instance.references)
        case _:
            return next(metric_values)


def _references(instance: Instance, own_candidates: Sequence[Candidate], *, repeated: bool) -> list[Candidate]:
    """The references as candidates, except those that are among the choices already."""
    choices = {candidate.response for candidate in own_candidates if candidate.source == "choice"}
    texts = [reference for reference in instance.references if reference.strip() and reference not in choices]
    return [Candidate(response=text, source="reference") for text in (texts if repeated else dict.fromkeys(texts))]


def _draw_mismatches(
    instances: Sequence[Instance], own_candidates: Sequence[Sequence[Candidate]], labelling: Labelling
) -> list[list[str]]:
    if labelling.preset == "paper":
        return _draw_as_published(instances, seed=labelling.seed)
    own_texts = [
        {*instance.references, *(candidate.response for candidate in candidates)}
        for instance, candidates in zip(instances, own_candidates, strict=True)
    ]
    return _draw_dissimilar(instances, own_texts, count=labelling.mismatches, seed=labelling.seed)


def _draw_dissimilar(
    instances: Sequence[Instance], own_texts: Sequence[set[str]], *, count: int, seed: int
) -> list[list[str]]:
    """Draws up to `count` distinct references of other instances with the same task and template for each instance.

    None is among the instance's own texts or reaches `MAX_MISMATCH_ROUGE`. Instances with choices get none, because
    they have wrong choices already.
    """
    pools = _reference_pools(instances, lambda instance: (instance.task, instance.template))
    draws: list[list[str]] = []
    for instance, texts in zip(instances, own_texts, strict=True):
        pool = pools[instance.task, instance.template]
        num_draws = 0 if instance.choices else min(len(pool), count and count + _EXTRA_DRAWS)
        picks = random.Random(f"{seed} {instance.instance_id}").sample(pool, num_draws)
        draws.append([text for text in picks if text not in texts])
    values = iter(rouge_l_pools([instance.references for instance in instances], draws).tolist())
    return [[text for text in texts if next(values) < MAX_MISMATCH_ROUGE][:count] for texts in draws]


def _draw_as_published(instances: Sequence[Instance], *, seed: int) -> list[list[str]]:
    """Draws mismatches like the published code: for each reference, any reference of the task, correct or not.

    A draw that is a reference of the instance is dropped and not drawn again (cappy_bigbench.py:31-37).
    """
    pools = _reference_pools(instances, lambda instance: instance.task)
    draws = []
    for instance in instances:
        rng = random.Random(f"{seed} {instance.instance_id}")
        pool = pools[instance.task]
        picks = [] if instance.choices else [rng.choice(pool) for _ in instance.references]
        draws.append([text for text in dict.fromkeys(picks) if text not in instance.references])
    return draws


def _reference_pools(instances: Iterable[Instance], key: Callable[[Instance], Hashable]) -> dict[Hashable, list[str]]:
    """Key -> the distinct references of the instances with that key, in order."""
    pools: dict[Hashable, dict[str, None]] = {}
    for instance in instances:
        pools.setdefault(key(instance), {}).update(dict.fromkeys(filter(str.strip, instance.references)))
    return {name: list(texts) for name, texts in pools.items()}
