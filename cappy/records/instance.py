"""The record that every step reads and writes: an instruction with its references, choices and candidates."""

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from cappy.errors import RecordError, quote

Split = Literal["train", "validation", "test"]
Source = Literal["reference", "choice", "mismatch", "llm"]
Status = Literal["ok", "empty", "refused", "failed", "truncated", "filtered"]

SPLITS: tuple[Split, ...] = get_args(Split)
GIVEN_METRIC = "given"
"""Metric name of labels that came with the candidates."""
SOURCES: tuple[Source, ...] = get_args(Source)
STATUSES: tuple[Status, ...] = get_args(Status)
MAX_LOGPROB = 1e100
"""Magnitude beyond which a number cannot be a log-probability; sums of squares of smaller ones are finite."""
SELECTABLE: tuple[Status, ...] = ("ok", "truncated")
"""Statuses of responses that an LLM would return to a user, including those that reached the length limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A text proposed for an instruction, with its origin, labels and scores.

    `logprob_sum` and `logprob_mean` are natural logarithms under the generator, including the end-of-sequence token;
    None if the generator cannot provide them. `labels` maps names of metrics to a correctness from 0 to 1, `scores`
    maps scorer versions to scores. Raises RecordError if the source or the status is unknown.
    """

    response: str
    source: Source = "llm"
    generator: str = ""
    revision: str = ""
    decoding: str = ""
    seed: int | None = None
    status: Status = "ok"
    logprob_sum: float | None = None
    logprob_mean: float | None = None
    num_tokens: int | None = None
    labels: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise RecordError(f"source must be one of {', '.join(SOURCES)}, got {quote(self.source)}")
        if self.status not in STATUSES:
            raise RecordError(f"status must be one of {', '.join(STATUSES)}, got {quote(self.status)}")

    def with_label(self, metric: str, label: float) -> "Candidate":
        """The candidate with one more label; much faster than `dataclasses.replace`, for millions of candidates."""
        return Candidate(
            response=self.response,
            source=self.source,
            generator=self.generator,
            revision=self.revision,
            decoding=self.decoding,
            seed=self.seed,
            status=self.status,
            logprob_sum=self.logprob_sum,
            logprob_mean=self.logprob_mean,
            num_tokens=self.num_tokens,
            labels={**self.labels, metric: label},
            scores=self.scores,
        )

    @property
    def selectable(self) -> bool:
        """Whether a selector may pick it: an LLM's response or a choice, never a reference or a mismatch."""
        return self.source in ("llm", "choice") and self.status in SELECTABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instruction with its references, choices and candidates.

    `group_id` identifies the source row of the instance, by default `instance_id`; splits and confidence intervals are
    by group. `original_task` is false for templates that reverse the task of their dataset (as marked in PromptSource).
    At least one reference is required unless there are candidates, which may already have labels or only need scores.
    Raises RecordError if the instruction is empty, the split is unknown, or references and candidates are missing.
    """

    instance_id: str
    instruction: str
    references: tuple[str, ...]
    group_id: str = ""
    task: str = ""
    template: str = ""
    original_task: bool = True
    split: Split = "train"
    choices: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        if not self.instruction.strip():
            raise RecordError(f"instance {quote(self.instance_id)}: the instruction is empty; give a text")
        if not self.candidates and not any(reference.strip() for reference in self.references):
            raise RecordError(f"instance {quote(self.instance_id)}: no reference; give at least one accepted answer")
        if self.split not in SPLITS:
            raise RecordError(
                f"instance {quote(self.instance_id)}: split must be one of {', '.join(SPLITS)}, got {quote(self.split)}"
            )
        if not self.group_id:
            object.__setattr__(self, "group_id", self.instance_id)

    @property
    def selectable(self) -> tuple[Candidate, ...]:
        """The candidates that a selector may pick, in order."""
        return tuple(candidate for candidate in self.candidates if candidate.selectable)


def prompt_hash(instruction: str) -> int:
    """64-bit hash of a prompt that ignores case, white space and Unicode normalisation form.

    The leakage check between training and evaluation compares these hashes.
    """
    normal = " ".join(unicodedata.normalize("NFKC", instruction).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")
