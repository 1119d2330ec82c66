"""The feedback log: every answer with its candidates, and beside it those that a user had a word for.

Three folders of records. `answers` holds all, and none of them is an instance yet, for nothing says what is right.
`rated` holds those whose choices got a score: the rated candidates alone, with their label `given`. `referenced` holds
those that got a reference, with all their candidates. The last two are read by `cappy adapt` and `annotation`; a scorer
learns from a rated answer only where two of its choices are.

Each folder grows row by row, and at every moment it is whole on disk. Rows of the open part are held in memory until it
is full, and written with it at every `flush` under a new name; the manifest then names the new part, and the old one
goes. A crash loses what was added since the last flush, and leaves at most a part that no manifest names, which the
next start removes. Rows are what users wrote: folder and files are their owner's alone, whatever the umask.
"""

import asyncio
import contextlib
import hashlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import pyarrow.parquet as pq
from filelock import Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cappy.errors import CappyError, FolderError
from cappy.files import hold_lock, make_private
from cappy.records import Candidate, File, Instance, Manifest, prompt_hash, read_manifest
from cappy.records.folder import MANIFEST, disk_errors, write_bytes, write_manifest
from cappy.records.instance import GIVEN
from cappy.records.schema import to_table
from serving.bodies import Bounds
from serving.gateway.answering import Outcome
from serving.gateway.errors import GatewayError
from serving.gateway.requests import invalid, read_object
from serving.gateway.upstream import Draw

FLUSH_SECONDS = 5.0
LOGGER = logging.getLogger("serving.gateway")
_HELD_OUT = (("test", 0.2), ("validation", 0.3))
"""Shares of the splits as preparation draws them, added up."""
PART_ROWS = 512
PART_CHARACTERS = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The columns of an instance, which it becomes once it has a reference or a label: before that it is none."""

    instance_id: str
    instruction: str
    candidates: tuple[Candidate, ...]
    group_id: str
    split: str
    references: tuple[str, ...] = ()
    task: str = "gateway"
    template: str = ""
    original_task: bool = True
    choices: tuple[str, ...] = ()


class AppendableDataset:
    """Rows by id under a manifest; of one process alone. FolderError where another process holds the folder."""

    def __init__(self, folder: Path, *, part_rows: int = PART_ROWS, part_characters: int = PART_CHARACTERS) -> None:
        self._folder = folder
        self._part_rows = part_rows
        self._part_characters = part_characters
        with disk_errors(folder):
            make_private(folder)
            self._lock = contextlib.ExitStack()
            try:
                self._lock.enter_context(hold_lock(folder / ".lock", timeout=0))
            except Timeout:
                raise FolderError(f"{folder}: another gateway writes there; give each a folder of its own") from None
        self._closed: list[File] = list(read_manifest(folder).files) if (folder / MANIFEST).exists() else []
        self._number = 1 + max((_number(file.name) for file in self._closed), default=-1)
        self._keys: dict[str, NDArray[np.uint64]] = {}
        self._open: dict[str, Answer] = {}
        self._characters = 0
        self._written: File | None = None
        self._changed = False
        self._remove_strays()

    def put(self, row: Answer) -> None:
        """Adds a row, or puts it in the place of the one with its id."""
        if row.instance_id not in self._open and (index := self._part_of(row.instance_id)) is not None:
            name = self._closed[index].name
            rows = {known.instance_id: known for known in _rows(self._folder / name)}
            self._closed[index] = self._write([*(rows | {row.instance_id: row}).values()])
            self._keys.pop(name, None)
            self._changed = True
            self.flush()
            return
        former = self._open.get(row.instance_id)
        self._open[row.instance_id] = row
        self._characters += _size(row) - (_size(former) if former else 0)
        self._changed = True
        if len(self._open) >= self._part_rows or self._characters >= self._part_characters:
            try:
                self.flush()
            except FolderError:
                # Or memory would grow for as long as the disk refuses.
                del self._open[row.instance_id]
                raise
            self._closed += [self._written] if self._written else []
            self._open, self._characters, self._written = {}, 0, None

    def get(self, instance_id: str) -> Answer | None:
        """The row with this id; None if there is none."""
        if instance_id in self._open:
            return self._open[instance_id]
        index = self._part_of(instance_id)
        if index is None:
            return None
        rows = _rows(self._folder / self._closed[index].name)
        return next(row for row in rows if row.instance_id == instance_id)

    def flush(self) -> None:
        """Writes what was added or changed since the last time."""
        if not self._changed:
            return
        self._written = self._write([*self._open.values()]) if self._open else None
        files = (*self._closed, *([self._written] if self._written else []))
        write_manifest(self._folder, Manifest(step="gateway", files=files), private=True)
        self._changed = False
        self._remove_strays()

    def close(self) -> None:
        """Writes the rest, and lets the folder go."""
        try:
            self.flush()
        finally:
            self._lock.close()

    def _write(self, rows: Sequence[Answer]) -> File:
        buffer = io.BytesIO()
        # A table is made of columns alone, and an answer has an instance's.
        pq.write_table(to_table(cast("Sequence[Instance]", rows)), buffer, compression="zstd")
        name = f"part-{self._number:05d}.parquet"
        self._number += 1
        write_bytes(self._folder / name, buffer.getvalue(), private=True)
        return File(
            name=name,
            sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
            rows=len(rows),
            candidates=sum(len(row.candidates) for row in rows),
        )

    def _part_of(self, instance_id: str) -> int | None:
        """The index of the closed part that holds this id, looked for from the newest on."""
        key = _key(instance_id)
        for index in range(len(self._closed) - 1, -1, -1):
            name = self._closed[index].name
            if (self._keys_of(name) == key).any() and instance_id in self._ids(name):
                return index
        return None

    def _keys_of(self, name: str) -> NDArray[np.uint64]:
        """Hashes of a closed part's ids, kept: every new answer is looked for in all parts."""
        keys = self._keys.get(name)
        if keys is None:
            keys = self._keys[name] = np.array([_key(one) for one in self._ids(name)], np.uint64)
        return keys

    def _ids(self, name: str) -> list[str]:
        ids: list[str] = pq.read_table(self._folder / name, columns=["instance_id"])["instance_id"].to_pylist()
        return ids

    def _remove_strays(self) -> None:
        named = {file.name for file in (*self._closed, *([self._written] if self._written else []))}
        for path in self._folder.glob("part-*.parquet"):
            if path.name not in named:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


def _key(instance_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(instance_id.encode(), digest_size=8).digest(), "big"))


def _size(row: Answer) -> int:
    """Characters of a row that a client chooses."""
    return len(row.instruction) + sum(map(len, row.references)) + sum(len(one.response) for one in row.candidates)


def _rows(path: Path) -> list[Answer]:
    return [Answer(**{**row, **_from_parquet(row)}) for row in pq.read_table(path).to_pylist()]


def _from_parquet(row: Mapping[str, Any]) -> dict[str, Any]:
    """What Parquet gives as lists, as the record has it."""
    maps = ("labels", "scores")
    candidates = tuple(Candidate(**{**one, **{name: dict(one[name]) for name in maps}}) for one in row["candidates"])
    return {"references": tuple(row["references"]), "choices": tuple(row["choices"]), "candidates": candidates}


def _number(name: str) -> int:
    return int(name.removeprefix("part-").removesuffix(".parquet"))


class Feedback(BaseModel):
    """What a user thought of an answer: a score from 0 to 1 of one of its choices, or what would have been right."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=200)]
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    reference: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[int, Field(ge=0)] = 0


def read_feedback(data: bytes, bounds: Bounds) -> Feedback:
    """The feedback in a body; GatewayError 400 where it is none, 413 where it is out of bounds."""
    body = read_object(data, bounds)
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
        """Keeps an answer; an error of the disk is logged, and the answer is given all the same."""
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
            self._referenced.put(check_row(replace(answer, references=(feedback.reference,))))
            return
        rated = answer.candidates[feedback.choice].with_label(GIVEN, feedback.score or 0.0)
        earlier = self._rated.get(feedback.id)
        others = [one for one in earlier.candidates if not _same(one, rated)] if earlier else []
        self._rated.put(check_row(replace(answer, candidates=(*others, rated))))

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


def check_row(answer: Answer) -> Answer:
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
        decoding=_decoding_name(outcome.request.body),
        seed=draw.seed,
        status=draw.status,
        logprob_sum=draw.logprob_sum,
        logprob_mean=draw.logprob_sum / draw.num_tokens if known else None,  # type: ignore[operator]
        num_tokens=draw.num_tokens,
        scores={outcome.scorer or "unversioned": draw.score} if draw.score is not None else {},
    )


def _decoding_name(body: Mapping[str, object]) -> str:
    """The knobs that the client turned, by name."""
    knobs = ("temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens")
    return ",".join(f"{knob}={body[knob]}" for knob in knobs if body.get(knob) is not None)
