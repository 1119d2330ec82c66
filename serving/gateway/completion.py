"""Writes an outcome as OpenAI's chat completion, whole or as a stream, with the gateway's own fields and headers."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from serving.gateway.answering import GatewayOutcome
from serving.gateway.errors import GatewayError

REFUSAL = "I do not have an answer that is good enough."
KEEP_ALIVE_SECONDS = 5.0
"""Interval of the comments that keep proxies and clients from timing out, in seconds; OpenAI's clients skip them."""
_COMMENT = ": sampling\n\n"
_PIECE = re.compile(r"\s*\S{1,40}\s?|\s+")


def completion(outcome: GatewayOutcome, completion_id: str, *, details: bool) -> dict[str, object]:
    """The body of a chat completion: the best choices first, and the usage of all candidates.

    `details` adds `cappy`: the summary of the outcome, and all candidates with their scores.
    """
    body: dict[str, object] = {
        "id": completion_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": outcome.best.model,
        "choices": _choices(outcome),
        "usage": _usage(outcome),
    }
    return {**body, "cappy": {**summary(outcome), "candidates": _candidates(outcome)}} if details else body


def _choices(outcome: GatewayOutcome) -> list[dict[str, object]]:
    """The choices, best first, as the LLM's server sent them; a refusal if the gateway abstains."""
    if outcome.kind == "abstained":
        message = {"role": "assistant", "content": REFUSAL, "refusal": REFUSAL}
        return [{"index": 0, "message": message, "logprobs": None, "finish_reason": "content_filter"}]
    return [
        {**candidate.choice, "index": index}
        for index, candidate in enumerate(outcome.candidates[: outcome.request.count])
    ]


def _usage(outcome: GatewayOutcome) -> dict[str, object]:
    """Tokens of all calls as reported by the LLMs' servers, including details."""
    total: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for usage in outcome.ledger.usages:
        total = _add_numbers(total, usage)
    return {**total, "total_tokens": total["prompt_tokens"] + total["completion_tokens"]}


def summary(outcome: GatewayOutcome) -> dict[str, object]:
    """Summarizes an outcome as JSON values; `limit` is null if none was reached.

    `score` is the `value` of the best candidate: its calibrated score or, without a calibration, its score.
    `unmetered_calls` counts calls whose tokens the server did not report: they are not in `usage`; the cost limits
    assume the maximum number of tokens for each.
    """
    ledger = outcome.ledger
    return {
        "outcome": outcome.kind,
        "stop": outcome.stop,
        "limit": outcome.limit,
        "score": outcome.best.value,
        "calibrated": outcome.calibrated,
        "scorer": outcome.scorer,
        "sampled": len(outcome.candidates),
        "calls": ledger.calls,
        "failed_calls": ledger.failed,
        "unmetered_calls": ledger.unmetered,
        "cost": round(ledger.cost, 9),
        "seconds": round(outcome.seconds, 3),
    }


def headers(outcome: GatewayOutcome) -> dict[str, str]:
    """The summary as headers, `X-Cappy-Outcome` to `X-Cappy-Seconds`; empty values are left out."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in summary(outcome).items()}
    return {
        f"X-Cappy-{name.replace('_', '-').title()}": value.encode("ascii", "replace").decode()
        for name, value in values.items()
        if value not in ("null", "")
    }


def _candidates(outcome: GatewayOutcome) -> list[dict[str, object]]:
    """All candidates with their scores, best first.

    `score` is the scorer's score, null if the candidate could not be scored. `calibrated_score` is its `value`, the
    expected label if it is the best of all candidates; null without a calibration. `selector_value` is the value by
    which the selector picked.
    """
    return [
        {
            "content": candidate.text,
            "score": candidate.score,
            "calibrated_score": candidate.value if outcome.calibrated else None,
            "selector_value": candidate.selector_value,
            "greedy": candidate.greedy,
            "status": candidate.status,
            "finish_reason": candidate.choice.get("finish_reason"),
            "model": candidate.model,
            "seed": candidate.seed,
        }
        for candidate in outcome.candidates
    ]


def chunks(outcome: GatewayOutcome, completion_id: str, *, details: bool) -> Iterator[dict[str, object]]:
    """The chunks of a stream: for each choice its role, its text in pieces and its finish_reason; then the usage.

    The last chunk of the first choice holds `cappy`, the summary, since the headers may have been sent before.
    """
    head = {
        "id": completion_id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": outcome.best.model,
    }
    if outcome.request.include_usage:
        head = {**head, "usage": None}
    for choice in _choices(outcome):
        yield from ({**head, "choices": [part]} for part in _choice_deltas(choice))
        last_chunk = {**head, "choices": [_choice_delta(choice, {}, finish=choice.get("finish_reason"))]}
        if choice["index"] == 0:
            extra = {"candidates": _candidates(outcome)} if details else {}
            last_chunk["cappy"] = {**summary(outcome), **extra}
        yield last_chunk
    if outcome.request.include_usage:
        yield {**head, "choices": [], "usage": _usage(outcome)}


def _choice_deltas(choice: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    """The chunks of a choice before its last one: role, other fields of the message, and the text in pieces."""
    message = choice.get("message") or {}
    content = message.get("content")
    other_fields = {
        name: value for name, value in message.items() if name not in ("role", "content") and value is not None
    }
    yield _choice_delta(choice, {"role": "assistant", "content": ""})
    if other_fields:
        yield _choice_delta(choice, other_fields)
    if choice.get("logprobs"):
        # Log-probabilities are per token and pieces are not tokens, so the text is sent in one chunk.
        yield _choice_delta(choice, {"content": content or ""}, logprobs=choice["logprobs"])
    else:
        yield from (_choice_delta(choice, {"content": piece}) for piece in split_text(content))


def split_text(content: object) -> Sequence[str]:
    """Splits a text into pieces of about a word; no pieces if it is not a string."""
    return _PIECE.findall(content) if isinstance(content, str) else ()


def _choice_delta(choice: Mapping[str, object], delta: Mapping[str, object], **more: object) -> dict[str, object]:
    return {
        "index": choice["index"],
        "delta": dict(delta),
        "logprobs": more.get("logprobs"),
        "finish_reason": more.get("finish"),
    }


def _add_numbers(total: Mapping[str, object], more: Mapping[str, object]) -> dict[str, Any]:
    """Adds up numbers by name at any depth; other values are ignored."""
    result = dict(total)
    for name, value in more.items():
        current = result.get(name)
        if isinstance(value, dict) and isinstance(current, dict | None):
            result[name] = _add_numbers(current or {}, value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and isinstance(current, int | float | None):
            result[name] = (current or 0) + value
    return result


async def events(
    task: "asyncio.Task[GatewayOutcome]",
    build_chunks: Callable[[GatewayOutcome], Iterator[Mapping[str, object]]],
    *,
    keep_alive: float,
) -> AsyncIterator[str]:
    """Yields the chunks of the outcome as server-sent events, then `[DONE]`.

    Until the outcome is known, sends a comment immediately, which opens the stream, and then one every `keep_alive`
    seconds.

    A GatewayError becomes an event with OpenAI's error object, which its clients raise. The task is cancelled when the
    client disconnects.
    """
    try:
        while not task.done():
            yield _COMMENT
            await asyncio.wait({task}, timeout=keep_alive)
        for chunk in build_chunks(task.result()):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except GatewayError as problem:
        yield _event(problem.body())
    finally:
        task.cancel()


def _event(values: Mapping[str, object]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(values)}\n\n"
