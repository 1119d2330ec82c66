"""What sampling took, part by part and in all, as the manifest tells it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cappy.records import Instance
from cappy.records.instance import STATUSES
from cappy.sampling.generators import Generator
from cappy.sampling.paid import Terms

_NOT_ASKED = "not_asked/"


def taken(part: Sequence[Instance], generators: Sequence[Generator]) -> dict[str, int]:
    """Counts of a finished part: what the generators tell, candidates by status, how many responses are different.

    `distinct` adds up the effective numbers: for each instance the different responses among its candidates that may
    be selected; `duplicates` are the others of those. Nothing without a generator.
    """
    if not generators:
        return {}
    names = {generator.name for generator in generators}
    counted = ("sampled", *(status for status in STATUSES if status != "ok"), "distinct", "duplicates")
    counts: Counter[str] = Counter(dict.fromkeys(counted, 0))
    for instance in part:
        drawn = [candidate for candidate in instance.candidates if candidate.generator in names]
        counts["sampled"] += len(drawn)
        counts.update(candidate.status for candidate in drawn if candidate.status != "ok")
        responses = [candidate.response for candidate in drawn if candidate.selectable]
        counts["distinct"] += len(set(responses))
        counts["duplicates"] += len(responses) - len(set(responses))
    for generator in generators:
        counts.update(generator.tally())
    return dict(counts)


def accounts(counts: Mapping[str, int], terms: Terms) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and facts of a manifest: the counts and what they cost; what each generator could not be asked for.

    `facts["not_asked"]` maps a generator to the parameters that it refused, and that some candidates came without.
    """
    metrics: dict[str, float] = {name: count for name, count in counts.items() if not name.startswith(_NOT_ASKED)}
    if "input_tokens" in counts and (terms.price_input or terms.price_output):
        metrics["cost"] = terms.cost(counts["input_tokens"], counts.get("output_tokens", 0))
    not_asked: dict[str, list[str]] = {}
    for name in sorted(set(counts) - set(metrics)):
        generator, _, parameter = name.removeprefix(_NOT_ASKED).rpartition("/")
        not_asked.setdefault(generator, []).append(parameter)
    return metrics, {"not_asked": not_asked} if not_asked else {}
