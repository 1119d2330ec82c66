"""What sampling took, part by part and in all, as the manifest tells it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cappy.errors import GeneratorError
from cappy.records import Instance
from cappy.records.instance import STATUSES
from cappy.sampling.generators import Generator
from cappy.sampling.paid import Terms

_NOT_ASKED = "not_asked/"
_UNANSWERED, _DRAWN, _FAILED = "unanswered", "drawn", "failed"
"""Kinds of counts that belong to a generator: such a count is named kind, generator and words, a line each."""
MOST_REASONS = 5
"""Reasons of a generator that are kept: servers may word every refusal differently."""


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


def failures(part: Sequence[Instance], generators: Sequence[Generator]) -> dict[str, int]:
    """Counts of a finished part by generator, for `check_failures`: its candidates, and those that failed."""
    counts = Counter({_key(kind, generator.name): 0 for kind in (_DRAWN, _FAILED) for generator in generators})
    for candidate in (candidate for instance in part for candidate in instance.candidates):
        if (drawn := _key(_DRAWN, candidate.generator)) in counts:
            counts[drawn] += 1
            counts[_key(_FAILED, candidate.generator)] += candidate.status == "failed"
    return dict(counts)


def accounts(counts: Mapping[str, int], terms: Terms) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics and facts of a manifest: the counts and what they cost; what each generator could not be asked for.

    `facts["not_asked"]` maps a generator to the parameters that it refused, and that some candidates came without;
    `facts["unanswered"]` to why candidates were not answered, in the server's words, and how many for each reason.
    """
    metrics: dict[str, float] = {
        name: count for name, count in counts.items() if not name.startswith(_NOT_ASKED) and "\n" not in name
    }
    if "input_tokens" in counts and (terms.price_input or terms.price_output):
        metrics["cost"] = terms.cost(counts["input_tokens"], counts.get("output_tokens", 0))
    not_asked: dict[str, list[str]] = {}
    for name in sorted(name for name in counts if name.startswith(_NOT_ASKED)):
        generator, _, parameter = name.removeprefix(_NOT_ASKED).rpartition("/")
        not_asked.setdefault(generator, []).append(parameter)
    unanswered: dict[str, Counter[str]] = {}
    for generator, words, count in _of_kind(counts, _UNANSWERED):
        unanswered.setdefault(generator, Counter())[words] += count
    facts: dict[str, Any] = {"not_asked": not_asked} if not_asked else {}
    if unanswered:
        facts["unanswered"] = {generator: _grouped(reasons) for generator, reasons in sorted(unanswered.items())}
    return metrics, facts


def unanswered_counts(generator: str, reasons: Mapping[str, int]) -> dict[str, int]:
    """Counts, for a part, of why this generator did not answer; they come back in `facts["unanswered"]`."""
    return {_key(_UNANSWERED, generator, words): count for words, count in _grouped(reasons).items()}


def check_failures(counts: Mapping[str, int], max_failed: float, wanted: Mapping[str, int] | None = None) -> None:
    """GeneratorError where more than this share of a generator's candidates failed, in its server's own words.

    `wanted` are the candidates of the whole run by generator: with it a run that is under way ends as soon as its
    share cannot be kept. Without it the counts are those of the whole run.
    """
    drawn = {generator: count for generator, _, count in _of_kind(counts, _DRAWN)}
    for generator, _, failed in _of_kind(counts, _FAILED):
        total = drawn[generator] if wanted is None else wanted[generator]
        if failed <= max_failed * total:
            continue
        reasons = Counter({words: count for name, words, count in _of_kind(counts, _UNANSWERED) if name == generator})
        why = f": {next(iter(_grouped(reasons)))}" if reasons else ""
        raise GeneratorError(
            f"{generator}: {failed:,} of {total:,} candidates failed, more than --max-failed {max_failed:g} allows"
            f"{why}; mend that or raise --max-failed, then run the same command again: every answer is kept"
        )


def _grouped(reasons: Mapping[str, int]) -> dict[str, int]:
    """The most frequent reasons, at most `MOST_REASONS`; those that differ in numbers alone count as one of them."""
    groups: dict[str, Counter[str]] = {}
    for words, count in reasons.items():
        groups.setdefault(re.sub("[0-9]+", "0", words), Counter())[words] += count
    totals = {min(group): sum(group.values()) for group in groups.values()}
    first = sorted(totals, key=lambda words: (-totals[words], words))[:MOST_REASONS]
    return {words: totals[words] for words in first}


def _key(kind: str, generator: str, words: str = "") -> str:
    return "\n".join((kind, generator, words))


def _of_kind(counts: Mapping[str, int], kind: str) -> Iterator[tuple[str, str, int]]:
    """Generator, words and number of each count of this kind."""
    for name, count in counts.items():
        if name.startswith(f"{kind}\n"):
            _, generator, words = name.split("\n", 2)
            yield generator, words, count
