"""What an endpoint answers, read without trust: a body that is no completion is a fault, not an empty response."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from cappy.errors import shown
from cappy.records import Candidate
from cappy.records.instance import Status
from cappy.sampling.paid import tokens_of
from cappy.sampling.strategies import Decoding
from cappy.untrusted import is_count, read_json, whole

MAX_CHARACTERS = 1_000_000
"""Of a response; a server that sends more was asked for less."""
MAX_NAME_CHARACTERS = 200
"""Of a model's name; a longer one is none."""


class BadAnswerError(Exception):
    """The body is not a completion; the same request may get a better one. `evidence` is what the server sent."""

    def __init__(self, problem: str, evidence: object) -> None:
        super().__init__(problem)
        self.problem = problem
        self.evidence = evidence

    def __str__(self) -> str:
        return self.text()

    def text(self, keys: Sequence[str] = ()) -> str:
        """What is wrong, and the beginning of the evidence without these keys and every secret that is known."""
        return f"{self.problem}: {shown(self.evidence, keys=keys)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response, and its share of what its request took.

    `requests` is 1 for the first choice of a request and 0 for the others. `left_out` names the parameters that the
    model had refused when it was asked. `kept` is false for what says nothing of the model: it is asked for again.
    """

    text: str
    status: Status
    model: str = ""
    seed: int | None = None
    logprob_sum: float | None = None
    num_tokens: int | None = None
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    left_out: tuple[str, ...] = ()
    kept: bool = True

    def candidate(self, generator: str, model: str, decoding: Decoding) -> Candidate:
        """The candidate for the record."""
        known = self.logprob_sum is not None and self.num_tokens
        return Candidate(
            response=self.text,
            generator=generator,
            revision=self.model or model,
            decoding=decoding.name,
            seed=self.seed,
            status=self.status,
            logprob_sum=self.logprob_sum,
            logprob_mean=self.logprob_sum / self.num_tokens if known else None,  # type: ignore[operator]
            num_tokens=self.num_tokens,
        )


def failed(status: Status, count: int) -> list[Answer]:
    """Answers for a request that the endpoint will not take for this instruction, however often it is sent."""
    return [Answer(text="", status=status, kept=False)] * count


def read_answers(
    body: bytes, instruction: str, *, count: int, seed: int | None, left_out: tuple[str, ...]
) -> list[Answer]:
    """The answers in the body of a completion, at most `count`, at least one; BadAnswerError if it is none.

    Choices that repeat an index are copies by a server that does not know `n`, and count once. Without a usage in the
    body, tokens go by the rule of thumb. Tokens of the response are shared out evenly, for only their sum is told.
    """
    values, choices = read_choices(body)
    told = [read_choice(choice) for choice in choices[:count]]
    used = values.get("usage")
    usage: Mapping[str, Any] = used if isinstance(used, dict) else {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    input_tokens = prompt if is_count(prompt) else tokens_of(instruction)
    output_tokens = completion if is_count(completion) else sum(tokens_of(text) for text, _, _ in told)
    model = model_name(values.get("model"))
    return [
        Answer(
            text=text,
            status=status,
            model=model,
            seed=seed,
            logprob_sum=sum(logprobs) if logprobs else None,
            num_tokens=len(logprobs) or None,
            requests=int(number == 0),
            input_tokens=input_tokens if number == 0 else 0,
            output_tokens=output_tokens // len(told) + int(number < output_tokens % len(told)),
            left_out=left_out,
        )
        for number, (text, status, logprobs) in enumerate(told)
    ]


def read_choices(body: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The body of a completion and its choices in order, copies of one index left out; BadAnswerError if it is none."""
    values = _json(body)
    found = values.get("choices")
    if not isinstance(found, list) or not found or not all(isinstance(choice, dict) for choice in found):
        raise BadAnswerError("the body has no choices", _decoded(body))
    by_index = {str(choice.get("index", number)): choice for number, choice in reversed(list(enumerate(found)))}
    return values, [by_index[index] for index in sorted(by_index)]


def model_name(value: object) -> str:
    """The name of the model that answered, as the server says; empty for what is no name."""
    return whole(value) if isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS else ""


def _json(body: bytes) -> dict[str, Any]:
    try:
        values = read_json(body)
    except json.JSONDecodeError:
        raise BadAnswerError("the body is no JSON", _decoded(body)) from None
    except ValueError as error:
        raise BadAnswerError(f"the body is no JSON ({error})", _decoded(body)) from None
    if not isinstance(values, dict):
        raise BadAnswerError("the body is no JSON object", _decoded(body))
    return values


def _decoded(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def read_choice(choice: Mapping[str, Any]) -> tuple[str, Status, list[float]]:
    """Text, status and the tokens' log-probabilities of a choice, of chat or of completions; BadAnswerError if none."""
    message = choice.get("message")
    if isinstance(message, dict):
        text, refusal = message.get("content"), message.get("refusal")
    elif "text" in choice:
        text, refusal = choice["text"], None
    else:
        raise BadAnswerError("a choice has neither message nor text", dict(choice))
    if isinstance(text, list):
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if not isinstance(text, str | None):
        raise BadAnswerError("the content of a choice is no text", text)
    stripped = whole(text or "").strip()
    if refusal and not stripped:
        text = whole(str(refusal)).strip()
    if len(text or "") > MAX_CHARACTERS:
        raise BadAnswerError(f"a response has more than {MAX_CHARACTERS:,} characters", text)
    if refusal:
        return stripped or text or "", "refused", []
    return stripped, _status(choice.get("finish_reason"), stripped), _logprobs(choice.get("logprobs"))


def _status(finish: object, text: str) -> Status:
    if finish == "content_filter":
        return "filtered"
    if not text:
        return "empty"
    return "truncated" if finish == "length" else "ok"


def _logprobs(told: object) -> list[float]:
    if not isinstance(told, dict):
        return []
    tokens = told.get("content")
    values: object = (
        [token.get("logprob") if isinstance(token, dict) else None for token in tokens]
        if isinstance(tokens, list)
        else told.get("token_logprobs")
    )
    if not isinstance(values, list):
        return []
    # JSON of others may hold NaN, Infinity and whole numbers beyond any float.
    numbers = [float(v) for v in values if _is_number(v) and abs(v) <= sys.float_info.max]
    # A likelihood with a gap would be that of another response.
    return numbers if len(numbers) == len(values) and math.isfinite(sum(numbers)) else []


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
