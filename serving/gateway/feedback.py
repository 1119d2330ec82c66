"""The feedback log: all answers with their candidates, and users' scores and references for them.

It has three folders of records. `answers` holds all answers; they are not instances, since they have no references or
labels. `rated` holds answers with scores from users: only the rated candidates, with the label `given`. `referenced`
holds answers with a reference from a user, with all candidates. The last two can be read by `cappy adapt` and
`annotation`; a scorer only learns from a rated answer if two of its choices are rated.

Each folder is complete on disk at any time. Rows of the open part stay in memory until it is full; every `flush` writes
them as a part with a new name, and the manifest then names the new part instead of the old one. A crash loses the rows
since the last flush and leaves at most one part that no manifest names, which the next start removes. Rows contain
users' texts, so folder and files are only readable by their owner, whatever the umask.
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
from cappy.records.instance import GIVEN_METRIC
from cappy.records.schema import to_table
from serving.bodies import Bounds
from serving.gateway.answering import GatewayOutcome
from serving.gateway.errors import GatewayError
from serving.gateway.requests import read_object, validation_error
from serving.gateway.scoring import SampledCandidate

FLUSH_SECONDS = 5.0
LOGGER = logging.getLogger("serving.gateway")
SPLIT_SHARES = (("test", 0.2), ("validation", 0.3))
"""Cumulative shares of the held-out splits, as in preparation."""
PART_ROWS = 512
PART_CHARACTERS = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackRow:
    """A row with the columns of an instance; it is only a valid instance once it has a reference or a label."""

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
    """Rows by id in Parquet parts under a manifest, for one process; raises FolderError if another holds the lock."""

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
                raise FolderError(f"{folder}: in use by another gateway; give each gateway its own folder") from None
        self._full_parts: list[File] = list(read_manifest(folder).files) if (folder / MANIFEST).exists() else []
        self._part_number = 1 + max((_part_number(file.name) for file in self._full_parts), default=-1)
        self._id_hashes: dict[str, NDArray[np.uint64]] = {}
        self._open_rows: dict[str, FeedbackRow] = {}
        self._characters = 0
        self._open_file: File | None = None
        self._has_changes = False
        self._remove_unlisted_parts()

    def put(self, row: FeedbackRow) -> None:
        """Adds a row, or replaces the one with its id."""
        if row.instance_id not in self._open_rows and (index := self._find_part(row.instance_id)) is not None:
            name = self._full_parts[index].name
            rows = {stored_row.instance_id: stored_row for stored_row in _read_rows(self._folder / name)}
            self._full_parts[index] = self._write([*(rows | {row.instance_id: row}).values()])
            self._id_hashes.pop(name, None)
            self._has_changes = True
            self.flush()
            return
        previous = self._open_rows.get(row.instance_id)
        self._open_rows[row.instance_id] = row
        self._characters += _num_characters(row) - (_num_characters(previous) if previous else 0)
        self._has_changes = True
        if len(self._open_rows) >= self._part_rows or self._characters >= self._part_characters:
            try:
                self.flush()
            except FolderError:
                # Otherwise memory would grow while the disk is full.
                del self._open_rows[row.instance_id]
                raise
            self._full_parts += [self._open_file] if self._open_file else []
            self._open_rows, self._characters, self._open_file = {}, 0, None

    def get(self, instance_id: str) -> FeedbackRow | None:
        """Returns the row with this id, or None."""
        if instance_id in self._open_rows:
            return self._open_rows[instance_id]
        index = self._find_part(instance_id)
        if index is None:
            return None
        rows = _read_rows(self._folder / self._full_parts[index].name)
        return next(row for row in rows if row.instance_id == instance_id)

    def flush(self) -> None:
        """Writes the rows that were added or changed since the last flush."""
        if not self._has_changes:
            return
        self._open_file = self._write([*self._open_rows.values()]) if self._open_rows else None
        files = (*self._full_parts, *([self._open_file] if self._open_file else []))
        write_manifest(self._folder, Manifest(step="gateway", files=files), private=True)
        self._has_changes = False
        self._remove_unlisted_parts()

    def close(self) -> None:
        """Flushes and releases the lock on the folder."""
        try:
            self.flush()
        finally:
            self._lock.close()

    def _write(self, rows: Sequence[FeedbackRow]) -> File:
        buffer = io.BytesIO()
        # `to_table` only reads the columns, which an answer shares with an instance.
        pq.write_table(to_table(cast("Sequence[Instance]", rows)), buffer, compression="zstd")
        name = f"part-{self._part_number:05d}.parquet"
        self._part_number += 1
        write_bytes(self._folder / name, buffer.getvalue(), private=True)
        return File(
            name=name,
            sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
            rows=len(rows),
            candidates=sum(len(row.candidates) for row in rows),
        )

    def _find_part(self, instance_id: str) -> int | None:
        """The index of the newest full part with this id, or None."""
        key = _hash_id(instance_id)
        for index in range(len(self._full_parts) - 1, -1, -1):
            name = self._full_parts[index].name
            if (self._id_hashes_of(name) == key).any() and instance_id in self._ids(name):
                return index
        return None

    def _id_hashes_of(self, name: str) -> NDArray[np.uint64]:
        """Hashes of a full part's ids, cached: every new id is looked up in all parts."""
        keys = self._id_hashes.get(name)
        if keys is None:
            keys = self._id_hashes[name] = np.array(
                [_hash_id(instance_id) for instance_id in self._ids(name)], np.uint64
            )
        return keys

    def _ids(self, name: str) -> list[str]:
        ids: list[str] = pq.read_table(self._folder / name, columns=["instance_id"])["instance_id"].to_pylist()
        return ids

    def _remove_unlisted_parts(self) -> None:
        listed = {file.name for file in (*self._full_parts, *([self._open_file] if self._open_file else []))}
        for path in self._folder.glob("part-*.parquet"):
            if path.name not in listed:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


def _hash_id(instance_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(instance_id.encode(), digest_size=8).digest(), "big"))


def _num_characters(row: FeedbackRow) -> int:
    """Number of characters in a row that clients and LLMs wrote."""
    return (
        len(row.instruction)
        + sum(map(len, row.references))
        + sum(len(candidate.response) for candidate in row.candidates)
    )


def _read_rows(path: Path) -> list[FeedbackRow]:
    return [FeedbackRow(**{**row, **_from_parquet(row)}) for row in pq.read_table(path).to_pylist()]


def _from_parquet(row: Mapping[str, Any]) -> dict[str, Any]:
    """Converts Parquet's lists to the types of the record."""
    maps = ("labels", "scores")
    candidates = tuple(
        Candidate(**{**candidate, **{name: dict(candidate[name]) for name in maps}}) for candidate in row["candidates"]
    )
    return {"references": tuple(row["references"]), "choices": tuple(row["choices"]), "candidates": candidates}


def _part_number(name: str) -> int:
    return int(name.removeprefix("part-").removesuffix(".parquet"))


class Feedback(BaseModel):
    """A user's feedback on an answer: a score from 0 to 1 for one of its choices (by index), or the right answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=200)]
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    reference: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[int, Field(ge=0)] = 0


def read_feedback(data: bytes, bounds: Bounds) -> Feedback:
    """Reads the feedback in a body; raises GatewayError 400 if it is invalid, 413 if it is out of bounds."""
    body = read_object(data, bounds)
    try:
        feedback = Feedback.model_validate(body)
    except ValidationError as error:
        raise validation_error(error, body) from None
    if (feedback.score is None) == (feedback.reference is None):
        raise GatewayError(400, 'give a score or a reference: {"id": "chatcmpl-...", "score": 0.8}', param="score")
    if feedback.reference is not None and not feedback.reference.strip():
        raise GatewayError(400, "reference is blank; give the right answer", param="reference")
    return feedback


class FeedbackLog:
    """Stores answers and feedback on them in a folder; one thread does all writing."""

    def __init__(self, folder: Path) -> None:
        with disk_errors(folder):
            make_private(folder)
        self._answers = AppendableDataset(folder / "answers")
        self._rated = AppendableDataset(folder / "rated")
        self._referenced = AppendableDataset(folder / "referenced")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feedback")

    async def store(self, outcome: GatewayOutcome, answer_id: str) -> None:
        """Stores an answer; an error of the disk is logged and does not fail the request."""
        try:
            await self._run_in_writer(lambda: self._answers.put(to_answer(outcome, answer_id)))
        except CappyError as error:
            LOGGER.error("feedback: %s; an answer was not stored", error)

    async def add(self, feedback: Feedback) -> None:
        """Adds a user's feedback; raises GatewayError 404 if the answer is not stored, 400 if it has no such choice."""
        await self._run_in_writer(lambda: self._add(feedback))

    async def flush_periodically(self) -> None:
        """Flushes every `FLUSH_SECONDS`, until it is cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            with contextlib.suppress(CappyError):
                await self._run_in_writer(self._flush)

    def close(self) -> None:
        """Flushes and releases the folders."""
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
            text = "no answer with this id is stored; give the id of a completion of this gateway"
            raise GatewayError(404, text, param="id", code="not_found")
        if feedback.choice >= len(answer.candidates):
            raise GatewayError(400, f"choice must be below {len(answer.candidates)}", param="choice")
        if feedback.reference is not None:
            self._referenced.put(check_answer(replace(answer, references=(feedback.reference,))))
            return
        rated_candidate = answer.candidates[feedback.choice].with_label(GIVEN_METRIC, feedback.score or 0.0)
        previous = self._rated.get(feedback.id)
        other_candidates = (
            [candidate for candidate in previous.candidates if not _is_same_candidate(candidate, rated_candidate)]
            if previous
            else []
        )
        self._rated.put(check_answer(replace(answer, candidates=(*other_candidates, rated_candidate))))

    async def _run_in_writer(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, work)


def to_answer(outcome: GatewayOutcome, answer_id: str) -> FeedbackRow:
    """The row of an outcome, candidates best first; equal conversations are in the same group and split."""
    prompt = prompt_hash(outcome.request.instruction)
    return FeedbackRow(
        instance_id=answer_id,
        instruction=outcome.request.instruction,
        group_id=f"{prompt:016x}",
        split=next((split for split, share in SPLIT_SHARES if prompt / 2**64 < share), "train"),
        candidates=tuple(_candidate(candidate, outcome) for candidate in outcome.candidates),
    )


def check_answer(answer: FeedbackRow) -> FeedbackRow:
    """Returns the row if it is a valid instance; raises RecordError otherwise."""
    Instance(**{name: getattr(answer, name) for name in answer.__dataclass_fields__})
    return answer


def _is_same_candidate(candidate: Candidate, other_candidate: Candidate) -> bool:
    return replace(candidate, labels={}) == replace(other_candidate, labels={})


def _candidate(candidate: SampledCandidate, outcome: GatewayOutcome) -> Candidate:
    has_logprobs = candidate.logprob_sum is not None and candidate.num_tokens
    return Candidate(
        response=candidate.text,
        generator=candidate.generator,
        revision=candidate.model,
        decoding=_decoding_name(outcome.request.body, greedy=candidate.greedy),
        seed=candidate.seed,
        status=candidate.status,
        logprob_sum=candidate.logprob_sum,
        logprob_mean=candidate.logprob_sum / candidate.num_tokens if has_logprobs else None,  # type: ignore[operator]
        num_tokens=candidate.num_tokens,
        scores={outcome.scorer or "unversioned": candidate.score} if candidate.score is not None else {},
    )


def _decoding_name(body: Mapping[str, object], *, greedy: bool) -> str:
    """The sampling parameters in the client's request, as `name=value`; `greedy` if the gateway decoded greedily."""
    if greedy:
        return "greedy"
    parameters = ("temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens")
    return ",".join(f"{name}={body[name]}" for name in parameters if body.get(name) is not None)
