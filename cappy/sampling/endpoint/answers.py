"""What an endpoint is asked and what it answers: requests, answers read without trust, and the answers that are kept.

A body that is not a completion is a fault, not an empty response. A server may begin with status 200 and fail later.
It then says so by `finish_reason`, or by an `error` object in
the choice or in the body, and the text is what it had by then. Such a choice is a fault as well. `finish_reason` is
read by what servers are known to write for a whole response, one at its limit, and one that was withheld; any other
word is a fault, since half a response that passes for a whole one cannot be found later. A server that says nothing
(null) without an error is believed.
"""

import json
import math
import re
import sys
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
from cappy.records.instance import Status
from cappy.sampling.generators import EndpointConfig, tokens_of
from cappy.sampling.store import LOCK
from cappy.sampling.strategies import Decoding
from cappy.untrusted import is_count, read_json, replace_surrogates


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An instruction under a decoding; sample `number` of it has the seed `seed + number`."""

    instruction: str
    decoding: Decoding
    seed: int

    def body(self, model: str, config: EndpointConfig, *, count: int, number: int) -> dict[str, object]:
        """The request for `count` samples from `number` on; every knob is stated, so that no server's default is."""
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
        body |= {knob: value for knob, value in beyond(decoding).items() if knob in config.extra}
        if not body.get("top_k", 1):
            body["top_k"] = -1
        return {**body, "n": count} if count > 1 else body


def beyond(decoding: Decoding) -> dict[str, float]:
    """The knobs that OpenAI's API lacks, by the names that vLLM's server has for them; 0 where they are off."""
    return {"top_k": decoding.top_k, "min_p": decoding.min_p, "min_tokens": decoding.min_new_tokens}


MAX_CHARACTERS = 1_000_000
"""Of a response; a server that sends more was asked for less."""
MAX_NAME_CHARACTERS = 200
"""Of a model's name; a longer one is none."""


LOG = "the server's log says why"
"""What helps where a server answers and then fails."""
_WHOLE = (
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
_UNSAID = ("", "null", "none")
_AT_LIMIT = (
    *("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit"),
    *("model_context_window_exceeded", "time_limit"),
)
_WITHHELD = (
    *("safety", "recitation", "blocklist", "prohibited_content", "spii", "sensitive", "moderation", "flagged"),
    *("guardrail", "guardrails", "guardrail_intervened", "error_toxic", "image_safety"),
)
_REASONING_PARTS = ("thinking", "reasoning", "redacted_thinking")
"""Types of the parts of a content that are not the answer."""


class BadAnswerError(Exception):
    """The body is not a completion; the same request may get a better one. `evidence` is what the server sent.

    `stated` is the error object that stands in the body, None if there is none. `usage` are the tokens, in and out, of
    choices that are of no use.
    """

    remedy = "check that the address is that of an OpenAI-compatible API"

    def __init__(self, problem: str, evidence: object, stated: object = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.evidence = evidence
        self.stated = stated
        self.usage: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.text()

    def text(self, keys: Sequence[str] = ()) -> str:
        """What is wrong, and the beginning of the evidence without these keys and every secret that is known."""
        return f"{self.problem}: {quote(self.evidence, keys=keys)}"


class NotUtf8Error(BadAnswerError):
    """A body that is neither UTF-8 nor in the charset that its header names."""

    remedy = "the server must send UTF-8, or name the charset that it sends"


class GivenUpError(BadAnswerError):
    """A choice that the server began and did not end; what else the body holds may be good."""

    remedy = LOG


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response, and its share of what its request took.

    `requests` is 1 for the first choice of a request and 0 for the others. `left_out` names the parameters that the
    model had refused when it was asked. `kept` is false for what says nothing of the model: it is asked for again.
    `reason` is why there is no text, in the server's words.
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


def failed_answers(status: Status, count: int, reason: str) -> list[Answer]:
    """Answers for a request that the endpoint will not take for this instruction, however often it is sent."""
    return [Answer(text="", status=status, kept=False, reason=reason)] * count


def read_answers(
    body: bytes, instruction: str, *, count: int, seed: int | None, left_out: tuple[str, ...]
) -> tuple[list[Answer], int]:
    """The answers in the body of a completion, at most `count`, at least one, and how many choices it had of those.

    BadAnswerError if it is not a completion, or if every choice in it failed; if only some failed, the others are
    answers. Choices that repeat an index are copies by a server that does not know `n`, and count once. Without a usage
    in the body, tokens are estimated by the rule of thumb. Tokens of the response are shared out evenly, since only
    their sum is known.
    """
    values, choices = read_choices(body)
    choices = choices[:count]
    good, fault = _good_choices(choices)
    used = values.get("usage")
    usage: Mapping[str, object] = used if isinstance(used, dict) else {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    input_tokens = prompt if is_count(prompt) else tokens_of(instruction)
    output_tokens = completion if is_count(completion) else sum(tokens_of(text) for text, _, _ in good)
    if fault is not None and not good:
        fault.usage = (input_tokens, output_tokens)
        raise fault
    model = model_name(values.get("model"))
    answers = [
        Answer(
            text=text,
            status=status,
            model=model,
            seed=seed,
            logprob_sum=sum(logprobs) if logprobs else None,
            num_tokens=len(logprobs) or None,
            requests=int(number == 0),
            input_tokens=input_tokens if number == 0 else 0,
            output_tokens=output_tokens // len(good) + int(number < output_tokens % len(good)),
            left_out=left_out,
        )
        for number, (text, status, logprobs) in enumerate(good)
    ]
    return answers, len(choices)


def _good_choices(
    choices: Sequence[Mapping[str, object]],
) -> tuple[list[tuple[str, Status, list[float]]], BadAnswerError | None]:
    """The choices that hold a response, and what is wrong with the first that the server gave up.

    BadAnswerError for what is not a choice at all.
    """
    good, fault = [], None
    for choice in choices:
        try:
            good.append(read_choice(choice))
        except GivenUpError as error:
            fault = fault or error
    return good, fault


def read_choices(body: bytes) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The body of a completion and its choices in order, copies of one index left out; BadAnswerError if it is none."""
    values = _json(body)
    listed = values.get("choices")
    if stated := _stated_error(values):
        raise BadAnswerError("the body holds an error", stated, stated)
    if not isinstance(listed, list) or not listed or not all(isinstance(choice, dict) for choice in listed):
        raise BadAnswerError("the body has no choices", _decode(body))
    by_index = {str(choice.get("index", number)): choice for number, choice in reversed(list(enumerate(listed)))}
    return values, [by_index[index] for index in sorted(by_index)]


def _stated_error(values: Mapping[str, object]) -> object:
    """The error object in a body or a choice; None if there is none, or one that says nothing."""
    stated = values.get("error")
    return None if not stated or (isinstance(stated, dict) and not any(stated.values())) else stated


def model_name(value: object) -> str:
    """The name of the model that answered, as the server says; empty for what is not a name."""
    return replace_surrogates(value) if isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS else ""


def _json(body: bytes) -> dict[str, object]:
    try:
        values = read_json(body)
    except UnicodeDecodeError:
        raise NotUtf8Error("the answer is not UTF-8", _decode(body)) from None
    except json.JSONDecodeError:
        raise BadAnswerError("the body is not JSON", _decode(body)) from None
    except ValueError as error:
        raise BadAnswerError(f"the body is not JSON ({error})", _decode(body)) from None
    if not isinstance(values, dict):
        raise BadAnswerError("the body is not a JSON object", _decode(body))
    return values


def _decode(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def read_choice(choice: Mapping[str, object]) -> tuple[str, Status, list[float]]:
    """Text, status and the tokens' log-probabilities of a choice, of chat or of completions; BadAnswerError if none.

    GivenUpError for one that the server began and did not end.
    """
    if stated := _stated_error(choice):
        raise GivenUpError("a choice holds an error", stated, stated)
    message = choice.get("message")
    if isinstance(message, dict):
        text, refusal = message.get("content"), message.get("refusal")
    elif "text" in choice:
        text, refusal = choice["text"], None
    else:
        raise BadAnswerError("a choice has neither message nor text", dict(choice))
    if isinstance(text, list):
        parts = [part for part in text if isinstance(part, dict) and part.get("type") not in _REASONING_PARTS]
        text = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(text, str | None):
        raise BadAnswerError("the content of a choice is not a text", text)
    stripped = replace_surrogates(text or "").strip()
    if refusal and not stripped:
        text = replace_surrogates(str(refusal)).strip()
    if len(text or "") > MAX_CHARACTERS:
        raise BadAnswerError(f"a response has more than {MAX_CHARACTERS:,} characters", text)
    if refusal:
        return stripped or text or "", "refused", []
    return stripped, _status(choice.get("finish_reason"), stripped), _logprobs(choice.get("logprobs"))


def _status(finish: object, text: str) -> Status:
    """What a `finish_reason` says of a response; GivenUpError for a word that is not known to mean an answer."""
    if isinstance(finish, dict):  # SGLang's own form
        finish = finish.get("type") or finish
    if finish and not isinstance(finish, str):
        raise GivenUpError("the server gave a response up: finish_reason", finish)
    word = re.sub("[ -]", "_", str(finish or "").strip().lower())
    if word in _AT_LIMIT:
        return "truncated" if text else "empty"
    if word in _UNSAID or word in _WHOLE:
        return "ok" if text else "empty"
    if word == "refusal":
        return "refused"
    if word in _WITHHELD or "filter" in word:
        return "filtered"
    raise GivenUpError("the server gave a response up: finish_reason", finish)


def _logprobs(stated: object) -> list[float]:
    if not isinstance(stated, dict):
        return []
    tokens = stated.get("content")
    values: object = (
        [token.get("logprob") if isinstance(token, dict) else None for token in tokens]
        if isinstance(tokens, list)
        else stated.get("token_logprobs")
    )
    if not isinstance(values, list):
        return []
    # JSON of others may hold NaN, Infinity and whole numbers beyond any float.
    numbers = [float(v) for v in values if _is_number(v) and abs(v) <= sys.float_info.max]
    # A likelihood with a gap would be that of another response.
    return numbers if len(numbers) == len(values) and math.isfinite(sum(numbers)) else []


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


FORMAT = 2
"""Of what is kept. Answers of 1 include responses that their server had given up (`finish_reason: error`)."""


class Cache:
    """Answers by key; without a folder in memory alone."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Answer] = {}
        self._lock: IO[str] | None = None
        self._locking = threading.Lock()

    def get(self, key: str) -> Answer | None:
        """The answer under this key; None if there is none or its file is damaged."""
        if self._folder is None:
            return self._memory.get(key)
        if self._folder.is_dir():
            self._use(self._folder)
        try:
            values = json.loads(_path(self._folder, key).read_bytes())
            answer = Answer(**{**values, "left_out": tuple(values["left_out"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return answer

    def put(self, key: str, answer: Answer) -> None:
        """Keeps an answer for good; FolderError if the disk will not have it."""
        if self._folder is None:
            self._memory[key] = answer
        else:
            self._use(self._folder)
            write_bytes(_path(self._folder, key), json.dumps(asdict(answer), ensure_ascii=False).encode(), private=True)

    def close(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _use(self, folder: Path) -> None:
        """Keeps the folder from being removed until the end; its lock says when it was used last."""
        with self._locking, disk_errors(folder):
            self._lock = self._lock or lock_shared(folder / LOCK)


def key_of(**determining: object) -> str:
    """The key of what determines an answer: address, model, api, prompt, every knob, seed, number of the sample."""
    return fingerprint("answer", FORMAT, determining)


def _path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key[2:]}.json"
