"""Labels for candidates: what each source means, and the candidates that training needs beside the sampled ones."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from cappy.records import Candidate, Instance

Metric = Callable[[Sequence[str], str], float]


def annotate(
    instances: Iterable[Instance], *, name: str, metric: Metric, mismatches: int = 1, seed: int = 0
) -> Iterator[Instance]:
    """Instances with `labels[name]` on every candidate, references and mismatches added to their candidates.

    A reference is 1, a mismatch 0, a choice 1 if it is a reference and else 0, an LLM's response its metric (Cappy,
    §3.1). A mismatch is the reference of another instance of the same task among those given; where there is none that
    differs from the instance's own texts, none is added.
    """
    given = list(instances)
    pools: dict[str, list[str]] = {}
    for instance in given:
        pools.setdefault(instance.task, []).extend(instance.references)
    for instance in given:
        kept = [candidate for candidate in instance.candidates if candidate.source in ("llm", "choice")]
        added = _references(instance, kept)
        if not instance.choices:
            own = {*instance.references, *(candidate.response for candidate in kept)}
            added += _mismatches(pools[instance.task], own, mismatches, random.Random(f"{seed} {instance.instance_id}"))
        labelled = (
            replace(candidate, labels={**candidate.labels, name: label(candidate, instance, metric)})
            for candidate in [*kept, *added]
        )
        yield replace(instance, candidates=tuple(labelled))


def label(candidate: Candidate, instance: Instance, metric: Metric) -> float:
    """The correctness of one candidate, 0 to 1, by its source."""
    match candidate.source:
        case "reference":
            return 1.0
        case "mismatch":
            return 0.0
        case "choice":
            return float(candidate.response in instance.references)
        case _:
            return metric(instance.references, candidate.response)


def _references(instance: Instance, kept: Sequence[Candidate]) -> list[Candidate]:
    """The references as candidates; a choice that is one already stands among the candidates."""
    choices = {candidate.response for candidate in kept if candidate.source == "choice"}
    texts = dict.fromkeys(reference for reference in instance.references if reference.strip())
    return [Candidate(response=text, source="reference") for text in texts if text not in choices]


def _mismatches(pool: Sequence[str], own: set[str], count: int, rng: random.Random) -> list[Candidate]:
    drawn = [rng.choice(pool) for _ in range(count)]
    texts = dict.fromkeys(text for text in drawn if text not in own)
    return [Candidate(response=text, source="mismatch") for text in texts]
