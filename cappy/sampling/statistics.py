"""Progress, counts and cautions of a sampling run.

The counts are taken per part, stored with the part, and summed for the manifest.
"""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from cappy.errors import GeneratorError
from cappy.progress import Progress, duration
from cappy.records import Candidate, Instance
from cappy.records.instance import STATUSES
from cappy.sampling.generators import EndpointConfig, EndpointGenerator, Generator
from cappy.sampling.recorded import Recorded
from cappy.sampling.strategies import MAX_NEW_TOKENS_LIMIT, Decoding, decodings_of
from cappy.specs import parse_spec

HEARTBEAT_SECONDS = 4.0
"""Maximum time between two progress reports, even if a generator reports nothing."""


class SamplingProgress:
    """Reports the progress of the step, including the candidates of the unfinished part.

    Rates and amounts cover this process only; the manifest has the totals of all runs. Inside a `with` block a thread
    repeats the report every `HEARTBEAT_SECONDS`.
    """

    def __init__(self, progress: Progress, generators: Sequence[Generator], decodings: Sequence[Decoding]) -> None:
        self._progress = progress
        self._endpoint_generators = [generator for generator in generators if isinstance(generator, EndpointGenerator)]
        self._samples_per_instance = sum(
            decoding.num_samples
            for position in range(len(generators))
            for decoding in decodings_of(decodings, position)
        )
        self._started = time.monotonic()
        self._candidates = self._part_candidates = 0
        self._in_progress = 0.0
        self._done = self._resumed = 0
        self._total: int | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heartbeat = threading.Thread(target=self._run_heartbeat, daemon=True)

    def __enter__(self) -> "SamplingProgress":
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heartbeat.join()

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "instances", resumed: int = 0, note: str = ""
    ) -> None:
        """Reports a finished part; the arguments are those of `Progress`."""
        with self._lock:
            self._done, self._total, self._resumed = done, total, resumed
            self._part_candidates, self._in_progress = 0, 0.0
            self._report()

    def add_candidates(self, candidates: int, /, *, in_progress: float = 0.0) -> None:
        """Adds finished candidates.

        `in_progress` is the progress on unfinished candidates, as a fractional number of candidates.
        """
        with self._lock:
            self._candidates += candidates
            self._part_candidates += candidates
            self._in_progress = in_progress
            self._report()

    def _run_heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._lock:
                try:
                    self._report()
                except OSError:  # The step gets the same error with its next report.
                    return

    def _report(self) -> None:
        instances = int(self._part_progress()) if self._samples_per_instance else 0
        done = self._done + instances if self._total is None else min(self._done + instances, self._total)
        self._progress(done, self._total, unit="instances", resumed=self._resumed, note=self._note(done))

    def _part_progress(self) -> float:
        """Progress on the unfinished part, as a fractional number of instances."""
        return (self._part_candidates + self._in_progress) / self._samples_per_instance

    def _note(self, done: int) -> str:
        usages = [generator.usage for generator in self._endpoint_generators]
        # First, because a terminal cuts the end of a long line.
        parts = list(dict.fromkeys(f"last error: {usage.last_error}" for usage in usages if usage.last_error))
        if not self._candidates and not self._in_progress:
            return ", ".join(parts)
        seconds = max(time.monotonic() - self._started, 1e-9)
        parts.append(f"{self._candidates:,} candidates ({self._candidates / seconds:,.3g}/s)")
        if done == self._resumed and self._total and self._samples_per_instance and self._part_progress():
            # `Progress` estimates the remaining time from finished instances, and there is none yet.
            remaining = seconds / self._part_progress() * (self._total - self._resumed) - seconds
            parts.append(f"{duration(max(remaining, 0.0))} left")
        if usages:
            tokens = f"{sum(u.input_tokens for u in usages):,} tokens in, {sum(u.output_tokens for u in usages):,} out"
            parts += [tokens, f"{sum(u.errors for u in usages):,} errors"]
            if cost := sum(u.cost for u in usages):
                parts.append(f"cost {cost:,.4g}")
        return ", ".join(parts)


_REJECTED = "not_asked/"
_UNANSWERED, _SAMPLED, _FAILED = "unanswered", "drawn", "failed"
"""Kinds of counts per generator. The name of such a count has three lines: kind, generator, reason."""
MAX_REASONS = 5
"""Maximum reasons per generator, because a server may word every refusal differently."""


def count_part(part: Sequence[Instance], generators: Sequence[Generator]) -> dict[str, int]:
    """Counts for a finished part: those of the generators, candidates by status, distinct and duplicate responses.

    `distinct` sums, over instances, the number of different responses among the selectable candidates; `duplicates`
    counts the rest of those candidates. Empty if there are no generators.
    """
    if not generators:
        return {}
    generator_of = _find_generator(generators)
    count_names = ("sampled", *(status for status in STATUSES if status != "ok"), "distinct", "duplicates")
    counts: Counter[str] = Counter(dict.fromkeys(count_names, 0))
    for instance in part:
        candidates = [candidate for candidate in instance.candidates if generator_of(candidate)]
        counts["sampled"] += len(candidates)
        counts.update(candidate.status for candidate in candidates if candidate.status != "ok")
        responses = [candidate.response for candidate in candidates if candidate.selectable]
        counts["distinct"] += len(set(responses))
        counts["duplicates"] += len(responses) - len(set(responses))
    for generator in generators:
        counts.update(generator.take_counts())
    return dict(counts)


def count_failures(part: Sequence[Instance], generators: Sequence[Generator]) -> dict[str, int]:
    """Counts of a finished part for `check_failures`: candidates and failed candidates per generator."""
    counts = Counter({_count_name(kind, generator.name): 0 for kind in (_SAMPLED, _FAILED) for generator in generators})
    generator_of = _find_generator(generators)
    for candidate in (candidate for instance in part for candidate in instance.candidates):
        if name := generator_of(candidate):
            counts[_count_name(_SAMPLED, name)] += 1
            counts[_count_name(_FAILED, name)] += candidate.status == "failed"
    return dict(counts)


def _find_generator(generators: Sequence[Generator]) -> Callable[[Candidate], str]:
    """A function that returns the name of the generator that gave a candidate; empty if it was none of these.

    Recorded candidates have the name of the recorded model, so they are recognised by the revision of their file.
    """
    recorded = {generator.revision: generator.name for generator in generators if isinstance(generator, Recorded)}
    others = {generator.name for generator in generators} - set(recorded.values())

    def find(candidate: Candidate) -> str:
        return recorded.get(candidate.revision) or (candidate.generator if candidate.generator in others else "")

    return find


def manifest_entries(counts: Mapping[str, int], config: EndpointConfig) -> tuple[dict[str, float], dict[str, object]]:
    """Metrics and facts for the manifest, from the summed counts of all parts.

    The metrics include `cost` if prices are set. `facts["not_asked"]` maps a generator to the request parameters that
    its server rejected and that were left out. `facts["unanswered"]` maps a generator to the server's reasons for
    failed candidates, with a count each.
    """
    metrics: dict[str, float] = {
        name: count for name, count in counts.items() if not name.startswith(_REJECTED) and "\n" not in name
    }
    if "input_tokens" in counts and (config.price_input or config.price_output):
        metrics["cost"] = config.cost(counts["input_tokens"], counts.get("output_tokens", 0))
    not_asked: dict[str, list[str]] = {}
    for name in sorted(name for name in counts if name.startswith(_REJECTED)):
        generator, _, parameter = name.removeprefix(_REJECTED).rpartition("/")
        not_asked.setdefault(generator, []).append(parameter)
    unanswered: dict[str, Counter[str]] = {}
    for generator, reason, count in _counts_of_kind(counts, _UNANSWERED):
        unanswered.setdefault(generator, Counter())[reason] += count
    facts: dict[str, object] = {"not_asked": not_asked} if not_asked else {}
    if unanswered:
        facts["unanswered"] = {generator: _group_reasons(reasons) for generator, reasons in sorted(unanswered.items())}
    return metrics, facts


def unanswered_counts(generator: str, reasons: Mapping[str, int]) -> dict[str, int]:
    """Counts of a part for the reasons why this generator did not answer; `facts["unanswered"]` shows them."""
    return {_count_name(_UNANSWERED, generator, reason): count for reason, count in _group_reasons(reasons).items()}


def check_failures(
    counts: Mapping[str, int],
    max_failed: float,
    samples_per_instance: Mapping[str, int],
    instances: int | None = None,
) -> None:
    """Raises GeneratorError if more than the share `max_failed` of a generator's candidates failed.

    The candidates of one instance may always fail unless `max_failed` is 0, so that a small run does not end for a
    single refused instruction. `samples_per_instance` is by generator. Pass `instances`, the total of the run, while
    the run is unfinished: the error is then raised as soon as the run is certain to exceed the limit.
    """
    sampled = {generator: count for generator, _, count in _counts_of_kind(counts, _SAMPLED)}
    for generator, _, failed in _counts_of_kind(counts, _FAILED):
        total = sampled[generator] if instances is None else samples_per_instance[generator] * instances
        allowed = max(max_failed * total, samples_per_instance[generator] if max_failed else 0)
        if failed <= allowed and (failed < total or not failed or max_failed >= 1):
            continue
        reasons = Counter(
            {reason: count for name, reason, count in _counts_of_kind(counts, _UNANSWERED) if name == generator}
        )
        why = f": {next(iter(_group_reasons(reasons)))}" if reasons else ""
        raise GeneratorError(
            f"{generator}: {failed:,} of {total:,} candidates failed, more than --max-failed {max_failed:g} allows"
            f"{why}; fix that or raise --max-failed, then run the same command again: every answer is kept"
        )


def _group_reasons(reasons: Mapping[str, int]) -> dict[str, int]:
    """The most frequent reasons with their counts, at most `MAX_REASONS`.

    Reasons that differ only in digits are one group.
    """
    groups: dict[str, Counter[str]] = {}
    for reason, count in reasons.items():
        groups.setdefault(re.sub("[0-9]+", "0", reason), Counter())[reason] += count
    totals = {min(group): sum(group.values()) for group in groups.values()}
    first = sorted(totals, key=lambda reason: (-totals[reason], reason))[:MAX_REASONS]
    return {reason: totals[reason] for reason in first}


def _count_name(kind: str, generator: str, reason: str = "") -> str:
    return "\n".join((kind, generator, reason))


def _counts_of_kind(counts: Mapping[str, int], kind: str) -> Iterator[tuple[str, str, int]]:
    """Generator, reason and number of each count of this kind."""
    for name, count in counts.items():
        if name.startswith(f"{kind}\n"):
            _, generator, reason = name.split("\n", 2)
            yield generator, reason, count


MAX_TRUNCATED_SHARE = 0.05
"""Share of truncated responses, 0 to 1, above which there is a caution."""
_MIN_SUGGESTED_TOKENS = 512


def cautions(metrics: Mapping[str, float], config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Cautions about the responses of a sampling run; the arguments are fields of its manifest.

    Each has a remedy, except those about recorded samples, in `facts["recorded"]`, from the checks before the run.
    """
    limits = [int(decoding["max_new_tokens"]) for decoding in config.get("decodings", ())]
    kinds = {parse_spec(text).kind for text in config.get("generator", ())}
    limit = None if kinds == {"recorded"} else max(limits, default=0)
    return [
        *facts.get("recorded", ()),
        *_truncation_cautions(metrics, limit, facts.get("context")),
        *_unanswered_cautions(metrics, facts.get("unanswered", {})),
        *_reasoning_cautions(metrics, stripped=bool(config.get("strip_reasoning"))),
    ]


def _truncation_cautions(metrics: Mapping[str, float], limit: int | None, context_tokens: int | None) -> Iterator[str]:
    """A caution if many responses were truncated; `limit` is in tokens, None for recorded samples."""
    sampled, truncated = metrics.get("sampled", 0), metrics.get("truncated", 0)
    if not sampled or truncated / sampled <= MAX_TRUNCATED_SHARE:
        return
    if limit is None:
        share = f"{truncated:,.0f} of {sampled:,.0f} responses ({100 * truncated / sampled:.1f} %)"
        yield f"{share} were truncated when they were recorded; record longer ones if that is too many"
        return
    suggested = min(max(_MIN_SUGGESTED_TOKENS, 2 * limit), MAX_NEW_TOKENS_LIMIT)
    # Leave room for the instruction.
    suggested = min(suggested, context_tokens // 2) if context_tokens else suggested
    percentage = f"{100 * truncated / sampled:.1f} %"
    message = f"{truncated:,.0f} of {sampled:,.0f} responses ({percentage}) were truncated at {limit} new tokens"
    if suggested <= limit:
        yield f"{message}; {_limit_remedy(context_tokens)}"
        return
    yield (
        f"{message}; sample with --max-new-tokens {suggested} (cappy adapt: --set sampling.max_new_tokens={suggested})"
    )


def _limit_remedy(context_tokens: int | None) -> str:
    if context_tokens:
        return f"the LLM's context is {context_tokens} tokens, including the instruction; use another LLM"
    return "this is the maximum; ask for shorter responses"


def _unanswered_cautions(metrics: Mapping[str, float], unanswered: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for generator, reasons in unanswered.items():
        count, reason = max((count, reason) for reason, count in reasons.items())
        total = sum(reasons.values())
        most_frequent = f": {reason}" if total == 1 else f"; {count:,} of them: {reason}"
        yield f"{generator}: {total:,} {'candidate' if total == 1 else 'candidates'} got no answer{most_frequent}"
    if metrics.get("failed"):
        yield f"failed candidates: {metrics['failed']:,.0f}; run cappy sampling again to retry them"


def _reasoning_cautions(metrics: Mapping[str, float], *, stripped: bool) -> Iterator[str]:
    if not metrics.get("reasoning"):
        return
    share = f"{metrics['reasoning']:,.0f} of {metrics['sampled']:,.0f} responses"
    if stripped:
        yield f"reasoning was removed from {share}; if responses are empty now, raise --max-new-tokens"
    else:
        yield (
            f"{share} hold reasoning (<think>...), which is labelled as part of the answer; "
            "--strip-reasoning removes it"
        )
