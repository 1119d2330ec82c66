"""What sampling takes: progress while a part is under way, counts part by part, and what a person should know."""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from cappy.errors import GeneratorError
from cappy.progress import Progress, duration
from cappy.records import Instance
from cappy.records.instance import STATUSES
from cappy.sampling.generators import EndpointConfig, Generator, PaidGenerator
from cappy.sampling.strategies import MAX_NEW_TOKENS_LIMIT, Decoding, decodings_of

HEARTBEAT_SECONDS = 4.0
"""The progress is said again at least that often, whatever a generator is busy with."""


class SamplingProgress:
    """The progress of the step's parts, with the candidates of the part under way counted in.

    Rates and amounts are of this start alone; what earlier starts paid for stands in the manifest at the end. Within a
    `with` block a thread says the progress again where a generator is silent for long.
    """

    def __init__(self, progress: Progress, generators: Sequence[Generator], decodings: Sequence[Decoding]) -> None:
        self._progress = progress
        self._paid = [generator for generator in generators if isinstance(generator, PaidGenerator)]
        own = [decodings_of(decodings, position) for position in range(len(generators))]
        self._each = sum(decoding.num_samples for of_one in own for decoding in of_one)
        self._started = time.monotonic()
        self._candidates = self._within = 0
        self._in_progress = 0.0
        self._done = self._resumed = 0
        self._total: int | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._heartbeat = threading.Thread(target=self._run_heartbeat, daemon=True)

    def __enter__(self) -> "SamplingProgress":
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._heartbeat.join()

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "instances", resumed: int = 0, note: str = ""
    ) -> None:
        """A part is done, as `Progress` says it."""
        with self._lock:
            self._done, self._total, self._resumed = done, total, resumed
            self._within, self._in_progress = 0, 0.0
            self._report()

    def add_candidates(self, candidates: int, /, *, in_progress: float = 0.0) -> None:
        """So many more candidates have come; those under way are `in_progress` candidates' worth of work."""
        with self._lock:
            self._candidates += candidates
            self._within += candidates
            self._in_progress = in_progress
            self._report()

    def _run_heartbeat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            with self._lock:
                try:
                    self._report()
                except OSError:  # The step itself meets it with its next candidates.
                    return

    def _report(self) -> None:
        within = int(self._part_progress()) if self._each else 0
        done = self._done + within if self._total is None else min(self._done + within, self._total)
        self._progress(done, self._total, unit="instances", resumed=self._resumed, note=self._note(done))

    def _part_progress(self) -> float:
        """Instances' worth of work done of the part under way."""
        return (self._within + self._in_progress) / self._each

    def _note(self, done: int) -> str:
        if not self._candidates and not self._in_progress:
            return ""
        seconds = max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self._candidates:,} candidates ({self._candidates / seconds:,.3g}/s)"]
        if done == self._resumed and self._total and self._each and self._part_progress():
            # Not one instance yet, so that nobody else can tell how long the rest takes.
            left = seconds / self._part_progress() * (self._total - self._resumed) - seconds
            parts.append(f"{duration(max(left, 0.0))} left")
        if self._paid:
            used = [generator.usage for generator in self._paid]
            tokens = f"{sum(u.input_tokens for u in used):,} tokens in, {sum(u.output_tokens for u in used):,} out"
            parts += [tokens, f"{sum(u.errors for u in used):,} errors"]
            if cost := sum(u.cost for u in used):
                parts.append(f"cost {cost:,.4g}")
        return ", ".join(parts)


_OMITTED = "not_asked/"
_UNANSWERED, _SAMPLED, _FAILED = "unanswered", "drawn", "failed"
"""Kinds of counts that belong to a generator: such a count is named kind, generator and words, a line each."""
MAX_REASONS = 5
"""Reasons of a generator that are kept: servers may word every refusal differently."""


def count_part(part: Sequence[Instance], generators: Sequence[Generator]) -> dict[str, int]:
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
        counts.update(generator.take_counts())
    return dict(counts)


def count_failures(part: Sequence[Instance], generators: Sequence[Generator]) -> dict[str, int]:
    """Counts of a finished part by generator, for `check_failures`: its candidates, and those that failed."""
    counts = Counter({_count_name(kind, generator.name): 0 for kind in (_SAMPLED, _FAILED) for generator in generators})
    for candidate in (candidate for instance in part for candidate in instance.candidates):
        if (drawn := _count_name(_SAMPLED, candidate.generator)) in counts:
            counts[drawn] += 1
            counts[_count_name(_FAILED, candidate.generator)] += candidate.status == "failed"
    return dict(counts)


def manifest_entries(counts: Mapping[str, int], config: EndpointConfig) -> tuple[dict[str, float], dict[str, object]]:
    """Metrics and facts of a manifest: the counts and what they cost; what each generator could not be asked for.

    `facts["not_asked"]` maps a generator to the parameters that it refused, and that some candidates came without;
    `facts["unanswered"]` to why candidates were not answered, in the server's words, and how many for each reason.
    """
    metrics: dict[str, float] = {
        name: count for name, count in counts.items() if not name.startswith(_OMITTED) and "\n" not in name
    }
    if "input_tokens" in counts and (config.price_input or config.price_output):
        metrics["cost"] = config.cost(counts["input_tokens"], counts.get("output_tokens", 0))
    not_asked: dict[str, list[str]] = {}
    for name in sorted(name for name in counts if name.startswith(_OMITTED)):
        generator, _, parameter = name.removeprefix(_OMITTED).rpartition("/")
        not_asked.setdefault(generator, []).append(parameter)
    unanswered: dict[str, Counter[str]] = {}
    for generator, words, count in _counts_of_kind(counts, _UNANSWERED):
        unanswered.setdefault(generator, Counter())[words] += count
    facts: dict[str, object] = {"not_asked": not_asked} if not_asked else {}
    if unanswered:
        facts["unanswered"] = {generator: _group_reasons(reasons) for generator, reasons in sorted(unanswered.items())}
    return metrics, facts


def unanswered_counts(generator: str, reasons: Mapping[str, int]) -> dict[str, int]:
    """Counts, for a part, of why this generator did not answer; they come back in `facts["unanswered"]`."""
    return {_count_name(_UNANSWERED, generator, words): count for words, count in _group_reasons(reasons).items()}


def check_failures(
    counts: Mapping[str, int], max_failed: float, each: Mapping[str, int], instances: int | None = None
) -> None:
    """GeneratorError where more than this share of a generator's candidates failed, in its server's own words.

    Those of one instance alone may fail whatever the share, unless it is 0: in a run of five that is no reason to end.
    `each` are the candidates of an instance by generator. With `instances`, those of the whole run, one that is under
    way ends as soon as its share cannot be kept; without it the counts are those of the whole run.
    """
    drawn = {generator: count for generator, _, count in _counts_of_kind(counts, _SAMPLED)}
    for generator, _, failed in _counts_of_kind(counts, _FAILED):
        total = drawn[generator] if instances is None else each[generator] * instances
        allowed = max(max_failed * total, each[generator] if max_failed else 0)
        if failed <= allowed and (failed < total or not failed or max_failed >= 1):
            continue
        reasons = Counter(
            {words: count for name, words, count in _counts_of_kind(counts, _UNANSWERED) if name == generator}
        )
        why = f": {next(iter(_group_reasons(reasons)))}" if reasons else ""
        raise GeneratorError(
            f"{generator}: {failed:,} of {total:,} candidates failed, more than --max-failed {max_failed:g} allows"
            f"{why}; mend that or raise --max-failed, then run the same command again: every answer is kept"
        )


def _group_reasons(reasons: Mapping[str, int]) -> dict[str, int]:
    """The most frequent reasons, at most `MAX_REASONS`; those that differ in numbers alone count as one of them."""
    groups: dict[str, Counter[str]] = {}
    for words, count in reasons.items():
        groups.setdefault(re.sub("[0-9]+", "0", words), Counter())[words] += count
    totals = {min(group): sum(group.values()) for group in groups.values()}
    first = sorted(totals, key=lambda words: (-totals[words], words))[:MAX_REASONS]
    return {words: totals[words] for words in first}


def _count_name(kind: str, generator: str, words: str = "") -> str:
    return "\n".join((kind, generator, words))


def _counts_of_kind(counts: Mapping[str, int], kind: str) -> Iterator[tuple[str, str, int]]:
    """Generator, words and number of each count of this kind."""
    for name, count in counts.items():
        if name.startswith(f"{kind}\n"):
            _, generator, words = name.split("\n", 2)
            yield generator, words, count


MAX_TRUNCATED_SHARE = 0.05
"""Share of responses cut at their limit of tokens above which a person reads of it."""
_MIN_SUGGESTED_TOKENS = 512


def cautions(metrics: Mapping[str, float], config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What a person should know about the responses of a sampled folder: sentences that end with what to do.

    The arguments are those of its manifest.
    """
    limits = [int(decoding["max_new_tokens"]) for decoding in config.get("decodings", ())]
    return [
        *_truncation_cautions(metrics, max(limits, default=0), facts.get("context")),
        *_unanswered_cautions(metrics, facts.get("unanswered", {})),
        *_reasoning_cautions(metrics, stripped=bool(config.get("strip_reasoning"))),
    ]


def _truncation_cautions(metrics: Mapping[str, float], limit: int, context: int | None) -> Iterator[str]:
    sampled, cut = metrics.get("sampled", 0), metrics.get("truncated", 0)
    if not sampled or cut / sampled <= MAX_TRUNCATED_SHARE:
        return
    longer = min(max(_MIN_SUGGESTED_TOKENS, 2 * limit), MAX_NEW_TOKENS_LIMIT)
    # The instruction needs its place too.
    longer = min(longer, context // 2) if context else longer
    said = f"{cut:,.0f} of {sampled:,.0f} responses ({100 * cut / sampled:.1f} %) were cut at {limit} new tokens"
    if longer <= limit:
        yield f"{said}, {_limit_reason(context)}"
        return
    yield (f"{said}; sample with --max-new-tokens {longer} (cappy adapt: --set sampling.max_new_tokens={longer})")


def _limit_reason(context: int | None) -> str:
    if context:
        return f"and the LLM's context holds {context} tokens, the instruction's among them; take another LLM"
    return "which is the most; ask for shorter responses"


def _unanswered_cautions(metrics: Mapping[str, float], unanswered: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for generator, reasons in unanswered.items():
        count, words = max((count, words) for words, count in reasons.items())
        total = sum(reasons.values())
        each = f": {words}" if total == 1 else f"; {count:,} of them: {words}"
        yield f"{generator} left {total:,} {'candidate' if total == 1 else 'candidates'} without an answer{each}"
    if metrics.get("failed"):
        yield f"failed candidates: {metrics['failed']:,.0f}; cappy sampling asks for them again in its next run"


def _reasoning_cautions(metrics: Mapping[str, float], *, stripped: bool) -> Iterator[str]:
    if not metrics.get("reasoning"):
        return
    share = f"{metrics['reasoning']:,.0f} of {metrics['sampled']:,.0f} responses"
    if stripped:
        yield f"reasoning was removed from {share}; where nothing was left raise --max-new-tokens"
    else:
        what = "hold reasoning (<think>...), which is labelled as part of the answer"
        yield f"{share} {what}; --strip-reasoning removes it"
