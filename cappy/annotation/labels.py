"""Labels for candidates: what each source means, and the candidates that training needs beside the sampled ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cappy.annotation import mismatches
from cappy.annotation.metrics import Metric, Pool, parse
from cappy.annotation.rouge import partly_visible, visible
from cappy.errors import RecordError, shown
from cappy.reasoning import has_reasoning
from cappy.records import Candidate, Instance
from cappy.records.instance import GIVEN

Recipe = Literal["default", "paper"]


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How candidates are labelled: `metric` under the name of its label, and what is added beside the sampled ones."""

    name: str
    metric: Metric = field(repr=False)
    recipe: Recipe = "default"
    mismatches: int = 1
    seed: int = 0


def annotate(instances: Sequence[Instance], labelling: Labelling) -> Iterator[Instance]:
    """Instances with `labels[name]` on every candidate, references and mismatches added to their candidates.

    A reference is 1, a mismatch 0, a choice 1 if it is a reference and else 0, an LLM's response its metric (Cappy,
    §3.1). Where one text stands twice, training takes the first (see `rows`): the reference, then what was sampled,
    then the mismatch; under the `paper` recipe the mismatch before what was sampled.
    """
    _refuse_unlabelled(instances)
    kept = [[one for one in instance.candidates if one.source in ("llm", "choice")] for instance in instances]
    sampled = [[one for one in candidates if one.source == "llm"] for candidates in kept]
    metric = iter(labelling.metric([Pool(*pool) for pool in zip(instances, sampled, strict=True)]).tolist())
    wrong = _mismatches(instances, kept, labelling)
    for instance, candidates, texts in zip(instances, kept, wrong, strict=True):
        planted = [Candidate(response=text, source="mismatch") for text in texts]
        references = _references(instance, candidates, repeated=labelling.recipe == "paper")
        middle = [*planted, *candidates] if labelling.recipe == "paper" else [*candidates, *planted]
        labelled = (one.labelled(labelling.name, _label(one, instance, metric)) for one in (*references, *middle))
        yield replace(instance, candidates=tuple(labelled))


def _refuse_unlabelled(instances: Sequence[Instance]) -> None:
    """RecordError where nothing says what is correct: prepared to be scored, not to learn from."""
    for instance in instances:
        if not instance.references and not any(GIVEN in candidate.labels for candidate in instance.candidates):
            remedy = "prepare it with references and without --unlabelled"
            raise RecordError(f"instance {shown(instance.instance_id)}: has no reference to compare with; {remedy}")


def count(instances: Sequence[Instance], *, name: str, mismatches: int) -> Mapping[str, int]:
    """What a reader of the labels should know.

    `responses` are those of LLMs, `with_reasoning` those of them that hold more than an answer. `invisible_to_rougeL`
    are the instances none of whose references Rouge-L sees, `partly_invisible_to_rougeL` those with a reference or
    response of which it sees a part only, `mismatches_missing` mismatches that were not found.
    """
    by_rouge = "rougeL" in parse(name)
    unseen = partly = 0
    for instance in instances if by_rouge else ():
        unseen += not any(map(visible, instance.references))
        texts = (candidate.response for candidate in instance.candidates if candidate.source == "llm")
        partly += any(map(partly_visible, instance.references)) or any(map(partly_visible, texts))
    responses = [one.response for instance in instances for one in instance.candidates if one.source == "llm"]
    open_ended = (instance.candidates for instance in instances if not instance.choices)
    planted = (sum(candidate.source == "mismatch" for candidate in candidates) for candidates in open_ended)
    counts = {
        "responses": len(responses),
        "with_reasoning": sum(map(has_reasoning, responses)),
        "invisible_to_rougeL": unseen,
        "partly_invisible_to_rougeL": partly,
        "mismatches_missing": sum(max(0, mismatches - number) for number in planted),
    }
    return {what: number for what, number in counts.items() if number}


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


def _mismatches(
    instances: Sequence[Instance], kept: Sequence[Sequence[Candidate]], labelling: Labelling
) -> list[list[str]]:
    if labelling.recipe == "paper":
        return mismatches.published(instances, seed=labelling.seed)
    own = [
        {*instance.references, *(candidate.response for candidate in candidates)}
        for instance, candidates in zip(instances, kept, strict=True)
    ]
    return mismatches.unlike(instances, own, count=labelling.mismatches, seed=labelling.seed)
