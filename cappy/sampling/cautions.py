"""What a person should know about the responses of a sampled folder, in sentences that end with what to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from cappy.sampling.strategies import MOST_NEW_TOKENS

MANY_CUT = 0.05
"""Share of responses cut at their limit of tokens above which a person reads of it."""
_ENOUGH_TOKENS = 512


def cautions(metrics: Mapping[str, float], decodings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should know about the responses of a sampled folder: sentences that end with what to do.

    `metrics` and `decodings` are those of its manifest.
    """
    sampled, cut = metrics.get("sampled", 0), metrics.get("truncated", 0)
    if not sampled or cut / sampled <= MANY_CUT:
        return []
    limit = max((int(decoding["max_new_tokens"]) for decoding in decodings), default=0)
    longer = min(max(_ENOUGH_TOKENS, 2 * limit), MOST_NEW_TOKENS)
    said = (
        f"{cut:,.0f} of {sampled:,.0f} responses ({100 * cut / sampled:.1f} %) were cut at {limit} new tokens; "
        f"sample with --max-new-tokens {longer} (cappy adapt: --set sampling.max_new_tokens={longer})"
    )
    return [said]
