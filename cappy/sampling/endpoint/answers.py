"""Requests to endpoints, parsing of their untrusted answers, and the cache of answers.

A body that is not a completion is an error, not an empty response. A server may fail after it has sent status 200; it
then reports this by `finish_reason`, or by an `error` object in the choice or the body, with an incomplete text. Such a
choice is an error as well, and so is an unknown `finish_reason` (null is accepted): the text may be incomplete.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeGuard

from cappy.config import fingerprint
from cappy.errors import quote
from cappy.files import lock_shared
from cappy.records import Candidate
from cappy.records.folder import disk_errors, write_bytes
from cappy.records.instance import MAX_LOGPROB, Status
from cappy.sampling.generators import EndpointConfig, estimate_tokens
from cappy.sampling.store import LOCK
from cappy.sampling.strategies import Decoding
from cappy.untrusted import is_count, read_json, replace_surrogates


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """An instruction with a decoding; sample `number` has the seed `seed + number`."""

    instruction: str
    decoding: Decoding
    seed: int

    def body(self, model: str, config: EndpointConfig, *, count: int, number: int) -> dict[str, object]:
        """The body of a request for `count` samples from `number` on; sets every parameter, so no default applies."""
        decoding = self.decoding
        body: dict[str, object] = {
            "model": model,
            "temperature": decoding.temperature if decoding.do_sample else 0.0,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_new_tokens,
            "seed": self.seed + number,
        }
        if config.api == "chat":
            body |= {"messages": [{"role": "user", "content": self.instruction}]}
        else:
            body |= {"prompt": self.instruction}
        if config.logprobs:
            body["logprobs"] = True if config.api == "chat" else 1
        body |= {name: value for name, value in extra_parameters(decoding).items() if name in config.extra}
        if not body.get("top_k", 1):
            body["top_k"] = -1
        return {**body, "n": count} if count > 1 else body


def extra_parameters(decoding: Decoding) -> dict[str, float]:
    """The parameters that OpenAI's API lacks, by vLLM's names for them; 0 if they are off."""
    return {"top_k": decoding.top_k, "min_p": decoding.min_p, "min_tokens": decoding.min_new_tokens}


MAX_CHARACTERS = 1_000_000
"""Maximum characters of a response; no request allows more."""
MAX_NAME_CHARACTERS = 200
"""Maximum characters of a model's name; a longer name is ignored."""

SERVER_LOG_REMEDY = "the server's log says why"
"""Remedy for a server that fails after it has begun to answer."""
_COMPLETE_REASONS = (
    *("stop", "eos", "eos_token", "end", "end_turn", "stop_sequence", "stop_token", "stop_word", "finish", "finished"),
    *(
        "endoftext",
        "end_of_text",
        "end_id",
        "stop_words",
        "complete",
        "completed",
        "done",
        "success",
        "tool_calls",
        "tool_call",
        "tool_use",
        "function_call",
    ),
)
_MISSING_REASONS = ("", "null", "none")
_LIMIT_REASONS = (
    *("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit"),
    *("model_context_window_exceeded", "time_limit"),
)
_FILTER_REASONS = (
    *("safety", "recitation", "blocklist", "prohibited_content", "spii", "sensitive", "moderation", "flagged"),
    *("guardrail", "guardrails", "guardrail_intervened", "error_toxic", "image_safety"),
)
_REASONING_PARTS = ("thinking", "reasoning", "redacted_thinking")
"""Types of content parts that are not the answer."""


class NotACompletionError(Exception):
    """The body is not a completion; a retry may succeed. `evidence` is what the server sent.

    `error_object` is the error object in the body, or None. `usage` is the number of input and output tokens of
    unusable choices.
    """

    remedy = "check that the address is that of an OpenAI-compatible API"

    def __init__(self, problem: str, evidence: object, error_object: object = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.evidence = evidence
        self.error_object = error_object
        self.usage: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.text()

    def text(self, keys: Sequence[str] = ()) -> str:
        """The problem and the beginning of the evidence, with these keys and all known secrets redacted."""
        return f"{self.problem}: {quote(self.evidence, keys=keys)}"


class NotUtf8Error(NotACompletionError):
    """The body is neither UTF-8 nor in the charset of its header."""

    remedy = "the server must send UTF-8, or name its charset in the header"


class IncompleteChoiceError(NotACompletionError):
    """A choice that the server did not complete; other choices of the body may be usable."""

    remedy = SERVER_LOG_REMEDY


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response, and its share of the request's usage.

    `requests` is 1 for the first choice of a request and 0 for the others. `left_out` names the parameters that the
    request lacked because the model refuses them. An answer with `kept` false is not cached, so it is requested again.
    `reason` is the server's reason for a missing text.
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
    reason: str = ""

    def candidate(self, generator: str, model: str, decoding: Decoding) -> Candidate:
        """The candidate of this answer."""
        has_logprobs = self.logprob_sum is not None and self.num_tokens
        return Candidate(
            response=self.text,
            generator=generator,
            revision=self.model or model,
            decoding=decoding.name,
            seed=self.seed,
            status=self.status,
            logprob_sum=self.logprob_sum,
            logprob_mean=self.logprob_sum / self.num_tokens if has_logprobs else None,  # type: ignore[operator]
            num_tokens=self.num_tokens,
        )


def failed_answers(status: Status, count: int, reason: str) -> list[Answer]:
    """Answers for a request that the endpoint refuses for this instruction."""
    return [Answer(text="", status=status, kept=False, reason=reason)] * count


def read_answers(
    body: bytes, instruction: str, *, count: int, seed: int | None, left_out: tuple[str, ...]
) -> tuple[list[Answer], int]:
    """The answers in the body of a completion, from 1 to `count`, and the number of choices that they came from.

    Raises NotACompletionError if the body is not a completion or no choice is complete; incomplete choices are left out
    if others are complete. Choices that repeat an index are copies from a server without `n`, and count once. Without a
    usage in the body, tokens are estimated. Only the sum of output tokens is known, so it is divided evenly.
    """
    values, choices = read_choices(body)
    choices = choices[:count]
    complete, error = _complete_choices(choices)
    usage_value = values.get("usage")
    usage: Mapping[str, object] = usage_value if isinstance(usage_value, dict) else {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    input_tokens = prompt if is_count(prompt) else estimate_tokens(instruction)
    output_tokens = completion if is_count(completion) else sum(estimate_tokens(text) for text, _, _ in complete)
    if error is not None and not complete:
        error.usage = (input_tokens, output_tokens)
        raise error
    model = model_name(values.get("model"))
    answers = [
        Answer(
            text=text,
            status=status,
            model=model,
            seed=seed,
            logprob_sum=sum(logprobs) if logprobs else None,
            num_tokens=len(logprobs) or None,
            requests=int(index == 0),
            input_tokens=input_tokens if index == 0 else 0,
            output_tokens=output_tokens // len(complete) + int(index < output_tokens % len(complete)),
            left_out=left_out,
        )
        for index, (text, status, logprobs) in enumerate(complete)
    ]
    return answers, len(choices)


def _complete_choices(
    choices: Sequence[Mapping[str, object]],
) -> tuple[list[tuple[str, Status, list[float]]], NotACompletionError | None]:
    """The complete choices, and the error of the first incomplete one.

    Raises NotACompletionError if one is not a choice.
    """
    complete, first_error = [], None
    for choice in choices:
        try:
            complete.append(read_choice(choice))
        except IncompleteChoiceError as error:
            first_error = first_error or error
    return complete, first_error


def read_choices(body: bytes) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The body of a completion and its choices by index, without duplicates.

    Raises NotACompletionError if it is not a completion.
    """
    values = _parse_body(body)
    choice_list = values.get("choices")
    if error_object := _error_object(values):
        raise NotACompletionError("the body holds an error", error_object, error_object)
    if (
        not isinstance(choice_list, list)
        or not choice_list
        or not all(isinstance(choice, dict) for choice in choice_list)
    ):
        raise NotACompletionError("the body has no choices", _decode(body))
    by_index = {str(choice.get("index", number)): choice for number, choice in reversed(list(enumerate(choice_list)))}
    return values, [by_index[index] for index in sorted(by_index)]


def _error_object(values: Mapping[str, object]) -> object:
    """The error object in a body or a choice; None if there is none or it is empty."""
    error = values.get("error")
    return None if not error or (isinstance(error, dict) and not any(error.values())) else error


def model_name(value: object) -> str:
    """The name of the model in the server's answer; empty if it is not a name."""
    return replace_surrogates(value) if isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS else ""


def _parse_body(body: bytes) -> dict[str, object]:
    try:
        values = read_json(body)
    except UnicodeDecodeError:
        raise NotUtf8Error("the answer is not UTF-8", _decode(body)) from None
    except json.JSONDecodeError:
        raise NotACompletionError("the body is not JSON", _decode(body)) from None
    except ValueError as error:
        raise NotACompletionError(f"the body is not JSON ({error})", _decode(body)) from None
    if not isinstance(values, dict):
        raise NotACompletionError("the body is not a JSON object", _decode(body))
    return values


def _decode(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def read_choice(choice: Mapping[str, object]) -> tuple[str, Status, list[float]]:
    """Text, status and token log-probabilities of a choice of chat or completions.

    Raises NotACompletionError if it is not a choice, and IncompleteChoiceError if the server did not complete it.
    """
    if error_object := _error_object(choice):
        raise IncompleteChoiceError("a choice holds an error", error_object, error_object)
    message = choice.get("message")
    if isinstance(message, dict):
        text, refusal = message.get("content"), message.get("refusal")
    elif "text" in choice:
        text, refusal = choice["text"], None
    else:
        raise NotACompletionError("a choice has neither message nor text", dict(choice))
    if isinstance(text, list):
        parts = [part for part in text if isinstance(part, dict) and part.get("type") not in _REASONING_PARTS]
        text = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(text, str | None):
        raise NotACompletionError("the content of a choice is not a string", text)
    stripped = replace_surrogates(text or "").strip()
    if refusal and not stripped:
        text = replace_surrogates(str(refusal)).strip()
    if len(text or "") > MAX_CHARACTERS:
        raise NotACompletionError(f"a response has more than {MAX_CHARACTERS:,} characters", text)
    if refusal:
        return stripped or text or "", "refused", []
    return stripped, _status(choice.get("finish_reason"), stripped), _logprobs(choice.get("logprobs"))


def _status(finish_reason: object, text: str) -> Status:
    """The status for a `finish_reason`. Raises IncompleteChoiceError for an unknown value."""
    if isinstance(finish_reason, dict):  # SGLang's own form
        finish_reason = finish_reason.get("type") or finish_reason
    if finish_reason and not isinstance(finish_reason, str):
        raise IncompleteChoiceError("the server did not complete a response: finish_reason", finish_reason)
    word = re.sub("[ -]", "_", str(finish_reason or "").strip().lower())
    if word in _LIMIT_REASONS:
        return "truncated" if text else "empty"
    if word in _MISSING_REASONS or word in _COMPLETE_REASONS:
        return "ok" if text else "empty"
    if word == "refusal":
        return "refused"
    if word in _FILTER_REASONS or "filter" in word:
        return "filtered"
    raise IncompleteChoiceError("the server did not complete a response: finish_reason", finish_reason)


def _logprobs(value: object) -> list[float]:
    if not isinstance(value, dict):
        return []
    tokens = value.get("content")
    values: object = (
        [token.get("logprob") if isinstance(token, dict) else None for token in tokens]
        if isinstance(tokens, list)
        else value.get("token_logprobs")
    )
    if not isinstance(values, list):
        return []
    # Foreign JSON may hold NaN, Infinity and integers that no float can represent.
    numbers = [float(v) for v in values if _is_number(v) and abs(v) <= MAX_LOGPROB]
    # The sum is only valid if no token is missing.
    return numbers if len(numbers) == len(values) and abs(sum(numbers)) <= MAX_LOGPROB else []


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


FORMAT = 2
"""Version of the cached answers. Format 1 included incomplete responses (`finish_reason: error`)."""


class AnswerCache:
    """Cache of answers by key. If `folder` is None, it is kept in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Answer] = {}
        self._lock: IO[str] | None = None
        self._lock_guard = threading.Lock()

    def get(self, key: str) -> Answer | None:
        """The answer for this key; None if there is none or its file is damaged."""
        if self._folder is None:
            return self._memory.get(key)
        if self._folder.is_dir():
            self._lock_folder(self._folder)
        try:
            values = json.loads((self._folder / key[:2] / f"{key[2:]}.json").read_bytes())
            return Answer(**{**values, "left_out": tuple(values["left_out"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Stores an answer. Raises FolderError if it cannot be written."""
        if self._folder is None:
            self._memory[key] = answer
        else:
            self._lock_folder(self._folder)
            path = self._folder / key[:2] / f"{key[2:]}.json"
            write_bytes(path, json.dumps(asdict(answer), ensure_ascii=False).encode(), private=True)

    def close(self) -> None:
        """Releases the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lock_folder(self, folder: Path) -> None:
        """Locks the folder against removal until `close`; the lock file's mtime records the last use."""
        with self._lock_guard, disk_errors(folder):
            self._lock = self._lock or lock_shared(folder / LOCK)


def answer_key(**inputs: object) -> str:
    """The key of an answer: a hash of address, model, API, prompt, all parameters, seed and sample number."""
    return fingerprint("answer", FORMAT, inputs)
