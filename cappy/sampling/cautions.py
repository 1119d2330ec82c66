"""What a person should know about the responses of a sampled folder, in sentences that end with what to do."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cappy.sampling.strategies import MOST_NEW_TOKENS

MANY_CUT = 0.05
"""Share of responses cut at their limit of tokens above which a person reads of it."""
_ENOUGH_TOKENS = 512


def cautions(metrics: Mapping[str, float], config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What a person should know about the responses of a sampled folder: sentences that end with what to do.

    The arguments are those of its manifest.
    """
    return [
        *_cut(metrics, config.get("decodings", ()), facts.get("context")),
        *_unanswered(metrics, facts),
        *_reasoning(metrics, config),
    ]


def _cut(metrics: Mapping[str, float], decodings: Sequence[Mapping[str, Any]], context: int | None) -> Iterator[str]:
    sampled, cut = metrics.get("sampled", 0), metrics.get("truncated", 0)
    if not sampled or cut / sampled <= MANY_CUT:
        return
    limit = max((int(decoding["max_new_tokens"]) for decoding in decodings), default=0)
    longer = min(max(_ENOUGH_TOKENS, 2 * limit), MOST_NEW_TOKENS)
    # The instruction needs its place too.
    longer = min(longer, context // 2) if context else longer
    said = f"{cut:,.0f} of {sampled:,.0f} responses ({100 * cut / sampled:.1f} %) were cut at {limit} new tokens"
    if longer <= limit:
        yield f"{said}, {_why_no_more(context)}"
        return
    yield (f"{said}; sample with --max-new-tokens {longer} (cappy adapt: --set sampling.max_new_tokens={longer})")


def _why_no_more(context: int | None) -> str:
    if context:
        return f"and the LLM's context holds {context} tokens, the instruction's among them; take another LLM"
    return "which is the most; ask for shorter responses"


def _unanswered(metrics: Mapping[str, float], facts: Mapping[str, Any]) -> Iterator[str]:
    unanswered: Mapping[str, Mapping[str, int]] = facts.get("unanswered", {})
    for generator, reasons in unanswered.items():
        count, words = max((count, words) for words, count in reasons.items())
        total = sum(reasons.values())
        each = f": {words}" if total == 1 else f"; {count:,} of them: {words}"
        yield f"{generator} left {total:,} {'candidate' if total == 1 else 'candidates'} without an answer{each}"
    if metrics.get("failed"):
        yield f"failed candidates: {metrics['failed']:,.0f}; cappy sampling asks for them again in its next run"


def _reasoning(metrics: Mapping[str, float], config: Mapping[str, Any]) -> Iterator[str]:
    if not metrics.get("reasoning"):
        return
    share = f"{metrics['reasoning']:,.0f} of {metrics['sampled']:,.0f} responses"
    if config.get("strip_reasoning"):
        yield f"reasoning was removed from {share}; where nothing was left raise --max-new-tokens"
    else:
        what = "hold reasoning (<think>...), which is labelled as part of the answer"
        yield f"{share} {what}; --strip-reasoning removes it"
