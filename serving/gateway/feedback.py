"""The feedback log: every answer with its candidates, and beside it those that a user had a word for.

Three folders of records. `answers` holds all, and none of them is an instance yet, for nothing says what is right.
`rated` holds those whose choices got a score: the rated candidates alone, with their label `given`. `referenced` holds
those that got a reference, with all their candidates. The last two are read by `cappy adapt` and `annotation`; a scorer
learns from a rated answer only where two of its choices are.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cappy.errors import CappyError
from cappy.files import make_private
from cappy.records import Candidate, Instance, prompt_hash
from cappy.records.folder import disk_errors
from cappy.records.instance import GIVEN
from serving.gateway.answering import Outcome
from serving.gateway.appendable_dataset import Answer, AppendableDataset
from serving.gateway.errors import GatewayError
from serving.gateway.requests import invalid, read_object
from serving.gateway.upstream import Draw

FLUSH_SECONDS = 5.0
LOGGER = logging.getLogger("serving.gateway")
_HELD_OUT = (("test", 0.2), ("validation", 0.3))
"""Shares of the splits as preparation draws them, added up."""


class Feedback(BaseModel):
    """What a user thought of an answer: a score from 0 to 1 of one of its choices, or what would have been right."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=200)]
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    reference: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[int, Field(ge=0)] = 0


def read_feedback(data: bytes) -> Feedback:
    """The feedback in a body; GatewayError 400 where it is none."""
    body = read_object(data)
    try:
        feedback = Feedback.model_validate(body)
    except ValidationError as error:
        raise invalid(error, body) from None
    if (feedback.score is None) == (feedback.reference is None):
        raise GatewayError(400, 'give a score or a reference: {"id": "chatcmpl-...", "score": 0.8}', param="score")
    if feedback.reference is not None and not feedback.reference.strip():
        raise GatewayError(400, "reference is blank; give the text that would have been right", param="reference")
    return feedback


class FeedbackLog:
    """Keeps answers and what is said of them under a folder; all writing is done in one thread."""

    def __init__(self, folder: Path) -> None:
        with disk_errors(folder):
            make_private(folder)
        self._answers = AppendableDataset(folder / "answers")
        self._rated = AppendableDataset(folder / "rated")
        self._referenced = AppendableDataset(folder / "referenced")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feedback")

    async def keep(self, outcome: Outcome, identity: str) -> None:
        """Keeps an answer; a disk that refuses is told in the log, and the answer is given all the same."""
        try:
            await self._in_writer(lambda: self._answers.put(answer_of(outcome, identity)))
        except CappyError as error:
            LOGGER.error("feedback: %s: an answer was not kept", error)

    async def add(self, feedback: Feedback) -> None:
        """Adds what a user said; GatewayError 404 where no such answer was kept."""
        await self._in_writer(lambda: self._add(feedback))

    async def flush_for_ever(self) -> None:
        """Writes what is new every `FLUSH_SECONDS`."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            with contextlib.suppress(CappyError):
                await self._in_writer(self._flush)

    def close(self) -> None:
        """Writes the rest and lets the folders go."""
        self._writer.shutdown(wait=True)
        for dataset in self._datasets:
            try:
                dataset.close()
            except CappyError as error:
                LOGGER.error("feedback: %s", error)

    @property
    def _datasets(self) -> tuple[AppendableDataset, ...]:
        return self._answers, self._rated, self._referenced

    def _flush(self) -> None:
        for dataset in self._datasets:
            dataset.flush()

    def _add(self, feedback: Feedback) -> None:
        answer = self._answers.get(feedback.id)
        if answer is None:
            text = "no answer with this id was kept here; give the id of a completion of this gateway"
            raise GatewayError(404, text, param="id", code="not_found")
        if feedback.choice >= len(answer.candidates):
            raise GatewayError(400, f"choice must be below {len(answer.candidates)}", param="choice")
        if feedback.reference is not None:
            self._referenced.put(checked(replace(answer, references=(feedback.reference,))))
            return
        rated = answer.candidates[feedback.choice].labelled(GIVEN, feedback.score or 0.0)
        earlier = self._rated.get(feedback.id)
        others = [one for one in earlier.candidates if not _same(one, rated)] if earlier else []
        self._rated.put(checked(replace(answer, candidates=(*others, rated))))

    async def _in_writer(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, work)


def answer_of(outcome: Outcome, identity: str) -> Answer:
    """The row of an outcome, its candidates best first; equal conversations are one group and have one split."""
    prompt = prompt_hash(outcome.request.instruction)
    return Answer(
        instance_id=identity,
        instruction=outcome.request.instruction,
        group_id=f"{prompt:016x}",
        split=next((split for split, share in _HELD_OUT if prompt / 2**64 < share), "train"),
        candidates=tuple(_candidate(draw, outcome) for draw in outcome.draws),
    )


def checked(answer: Answer) -> Answer:
    """The row, once it is an instance; RecordError where it is none."""
    Instance(**{name: getattr(answer, name) for name in answer.__dataclass_fields__})
    return answer


def _same(one: Candidate, other: Candidate) -> bool:
    return replace(one, labels={}) == replace(other, labels={})


def _candidate(draw: Draw, outcome: Outcome) -> Candidate:
    known = draw.logprob_sum is not None and draw.num_tokens
    return Candidate(
        response=draw.text,
        generator=draw.generator,
        revision=draw.model,
        decoding=_decoding(outcome.request.body),
        seed=draw.seed,
        status=draw.status,
        logprob_sum=draw.logprob_sum,
        logprob_mean=draw.logprob_sum / draw.num_tokens if known else None,  # type: ignore[operator]
        num_tokens=draw.num_tokens,
        scores={outcome.scorer or "unversioned": draw.score} if draw.score is not None else {},
    )


def _decoding(body: Mapping[str, object]) -> str:
    """The knobs that the client turned, by name."""
    knobs = ("temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens")
    return ",".join(f"{knob}={body[knob]}" for knob in knobs if body.get(knob) is not None)
