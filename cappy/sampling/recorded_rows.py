"""Reads recorded samples from a file or a folder of records; every error names the row and the field."""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.errors import RecordError, quote
from cappy.records import Candidate, read
from cappy.records.instance import SELECTABLE, STATUSES
from cappy.sampling.strategies import is_decoding_name

if TYPE_CHECKING:
    from cappy.preparation.rows import RowFields, Values

_LOGGER = logging.getLogger("cappy.sampling")

UNNAMED = "recorded"
"""Name of the decoding of samples that are recorded without one."""
_MAX_CHARACTERS = 2**31
_MAX_NAME_CHARACTERS = 200
_LIKELIHOOD_FIELDS = {"logprob_sum", "logprob_mean", "num_tokens"}
_SAMPLE_FIELDS = {"response", "text", "decoding", "sample", "status", "model", "generator", "seed", *_LIKELIHOOD_FIELDS}
_INSTANCE_FIELDS = {"id", "instance_id", "group_id", "task", "template", "original_task", "split", "source"}
_ROW_FIELDS = {"instruction", "prompt", "input", "candidates", "reference", "references", "choices", *_INSTANCE_FIELDS}
"""Fields of a row that make it an instance too, which preparation reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One recorded response; the candidate's generator is the recorded model, or empty.

    `number` counts the samples of a prompt, decoding and model; None: in the order of the file.
    """

    where: str
    instruction: str
    candidate: Candidate
    number: int | None = None


def read_folder(folder: Path) -> Iterator[Sample]:
    """The responses of LLMs in a folder of records."""
    for instance in read(folder):
        where = f"{folder}: instance {quote(instance.instance_id)}"
        candidates = (candidate for candidate in instance.candidates if candidate.source == "llm")
        yield from _number(
            Sample(where=where, instruction=instance.instruction, candidate=_with_names(candidate))
            for candidate in candidates
        )


def read_file(path: Path) -> Iterator[Sample]:
    """The samples of a JSON Lines, JSON, Parquet or Arrow file: one in each row, or several in its list `candidates`.

    Fields that are not read are logged once. Raises RecordError for a row that is not valid, and for CSV.
    """
    from cappy.preparation.files import choose_reader
    from cappy.preparation.tables import read_csv

    reader = choose_reader(path)
    if reader is read_csv:
        raise RecordError(
            f"{path}: is CSV, but samples are read from JSON Lines (also .gz, .xz) or Parquet; convert it"
        )
    unread: set[str] = set()
    grouped = _GroupedRows()
    for where, values in reader(path):
        yield from _read_row(where, values, unread, grouped)
    if unread:
        names = quote(", ".join(sorted(unread)), 200)
        _LOGGER.warning("%s: fields of samples that are not read: %s", path, names)


def _read_row(where: str, values: "Values", unread: set[str], grouped: "_GroupedRows") -> Iterator[Sample]:
    """The samples of a row: one, or those in `candidates`. Raises RecordError that names the row and the field."""
    from cappy.preparation.columns import append_input
    from cappy.preparation.rows import RowFields

    if "instruction" not in values and "prompt" in values:
        values = {**values, "instruction": values["prompt"]}
    fields = RowFields(where, append_input(where, values, is_mapped=False), _MAX_CHARACTERS)
    instruction = fields.text("instruction") if fields.has("instruction") else ""
    if not instruction.strip():
        raise RecordError(
            f"{where}: has no prompt, fields: {fields.names()}; give it in the field instruction or prompt"
        )
    items, is_sample = fields.values.get("candidates"), fields.has("response") or fields.has("text")
    if items is not None and (is_sample or not isinstance(items, list)):
        remedy = "give a list of objects, or one response in each row without the field candidates"
        raise RecordError(f"{where}: candidates cannot be read as samples, got {quote(items)}; {remedy}")
    if is_sample:
        unread |= fields.values.keys() - _SAMPLE_FIELDS - _ROW_FIELDS
        yield _read_sample(fields, instruction, ("model", "generator"))
    elif items is not None:
        yield from grouped.number(list(_read_items(where, instruction, items, unread)))
    elif not fields.has("choices"):  # Choices are scored, not sampled for.
        remedy = "give response (or text), or candidates: a list of objects with text"
        raise RecordError(f"{where}: has no response, fields: {fields.names()}; {remedy}")


def _read_items(where: str, instruction: str, items: Sequence[object], unread: set[str]) -> Iterator[Sample]:
    from cappy.preparation.rows import RowFields

    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise RecordError(f"{where}: candidates[{index}] must be an object with text, got {quote(item)}; write one")
        unread |= item.keys() - _SAMPLE_FIELDS - {"system"}
        fields = RowFields(f"{where}: candidates[{index}]", item, _MAX_CHARACTERS)
        yield _read_sample(fields, instruction, ("model", "generator", "system"))


def _read_sample(fields: "RowFields", instruction: str, model_fields: Sequence[str]) -> Sample:
    from cappy.preparation.rows import parse_candidate

    number, status = fields.integer("sample", 64), fields.optional_text("status") or "ok"
    if status not in STATUSES:
        raise RecordError(f"{fields.where}: status must be one of {', '.join(STATUSES)}, got {quote(status)}")
    if number is not None and number < 0:
        raise RecordError(f"{fields.where}: sample must be 0 or more, got {number}; number the samples of a prompt")
    candidate = parse_candidate(fields, model_fields)
    for text in (candidate.generator, candidate.decoding):
        if len(text) > _MAX_NAME_CHARACTERS or not text.isprintable():
            remedy = f"give one line of at most {_MAX_NAME_CHARACTERS} characters"
            raise RecordError(f"{fields.where}: {quote(text)} cannot name a model or a decoding; {remedy}")
    is_blank = status in SELECTABLE and not candidate.response.strip()
    candidate = replace(candidate, status="empty" if is_blank else status)
    return Sample(where=fields.where, instruction=instruction, candidate=_with_names(candidate), number=number)


def _with_names(candidate: Candidate) -> Candidate:
    """The candidate with a decoding: its own, or the last word of `MODEL DECODING`, or `UNNAMED`."""
    if candidate.decoding.strip():
        return candidate
    model, _, last_word = candidate.generator.rpartition(" ")
    if is_decoding_name(last_word):
        return replace(candidate, generator=model, decoding=last_word)
    return replace(candidate, decoding=UNNAMED)


class _GroupedRows:
    """Numbers the samples of rows that have several, over all rows of a prompt; a row that is repeated counts once."""

    def __init__(self) -> None:
        self._counts: defaultdict[bytes, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._first_counts: dict[bytes, Counter[tuple[str, str]]] = {}
        """Row -> the counts of its prompt before it was read first."""

    def number(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """The samples of the next row with their numbers."""
        prompt = _digest([each.instruction for each in samples[:1]])
        row = _digest([prompt.hex(), *(repr(each.candidate) for each in samples)])
        counts = self._first_counts.setdefault(row, self._counts[prompt].copy()).copy()
        yield from _number(samples, counts)
        self._counts[prompt] |= counts


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def _number(samples: Iterable[Sample], counts: "Counter[tuple[str, str]] | None" = None) -> Iterator[Sample]:
    """The samples of one prompt, each with its number in the order of its decoding and model unless it has one.

    `counts` has the samples that were numbered before; those of `samples` are added.
    """
    counts = Counter() if counts is None else counts
    for sample in samples:
        key = (sample.candidate.decoding, sample.candidate.generator)
        yield sample if sample.number is not None else replace(sample, number=counts[key])
        counts[key] += 1
