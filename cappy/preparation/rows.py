"""Turns the fields of a row into an instance; every error names the row and the field."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, TypeGuard

from cappy.errors import RecordError, quote
from cappy.records import Candidate, Instance, prompt_hash
from cappy.records.instance import GIVEN_METRIC, SPLITS, Status

Values = Mapping[str, object]
Rows = Iterator[tuple[str, Values]]
"""Pairs of location (file:line) and the fields of a row by name."""

_IMPORTED_REVISION = "imported"
"""Revision of candidates that were sampled elsewhere."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """An instance and where it was read. If `has_id` or `has_split` is false, its id or split is a placeholder."""

    where: str
    instance: Instance
    has_id: bool = True
    has_split: bool = True


def hash64(text: str) -> int:
    """A 64-bit blake2b hash, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def find_invalid_character(text: str) -> str:
    """Describes the first character that a file of records cannot store, with the remedy; empty if there is none."""
    if "\0" in text:
        return f"a NUL (character {text.index(chr(0)) + 1}); delete it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        description = f"an unpaired surrogate ({quote(text[error.start])}, character {error.start + 1})"
        return f"{description}; delete it or write the whole character"
    return ""


def column_names(names: Iterable[object], limit: int = 120) -> str:
    """Column names for a message, shortened to `limit` characters; pandas writes its index without a name."""
    return quote(", ".join(str(name) or "(no name)" for name in names) or "none", limit)


def parse_row(where: str, values: Values, *, task: str, max_characters: int, unlabelled: bool = False) -> SourceRow:
    """The instance in the fields of a row; raises RecordError that names the wrong field and the remedy.

    An `unlabelled` row needs responses but no reference. `max_characters` limits each text.
    """
    fields = RowFields(where, values, max_characters)
    instruction = _read_instruction(fields)
    candidates = (*_read_responses(fields), *_read_candidates(fields))
    if unlabelled and not candidates:
        remedy = "give the responses to score in the field responses, or leave --unlabelled out"
        raise RecordError(f"{where}: has no responses, fields found: {fields.names()}; {remedy}")
    all_labelled = bool(candidates) and all(GIVEN_METRIC in candidate.labels for candidate in candidates)
    references = _read_references(fields, required=not all_labelled and not unlabelled)
    choices = _read_choices(fields, references)
    instance_id = fields.optional_text("instance_id", "id")
    split = fields.optional_text("split")
    if split and split not in SPLITS:
        raise RecordError(f"{where}: split must be one of {', '.join(SPLITS)}, got {quote(split)}; rename it")
    instance = Instance(
        instance_id=instance_id,
        group_id=fields.optional_text("group_id") or f"{prompt_hash(instruction):016x}",
        task=fields.optional_text("task") or task,
        template=fields.optional_text("template"),
        original_task=fields.boolean("original_task", default=True),
        split=split or SPLITS[0],
        instruction=instruction,
        references=references,
        choices=choices,
        candidates=candidates or choice_candidates(choices),
    )
    return SourceRow(where, instance, has_id=bool(instance_id), has_split=bool(split))


def choice_candidates(choices: Sequence[str]) -> tuple[Candidate, ...]:
    """One candidate for each choice, in order."""
    return tuple(Candidate(response=choice, source="choice") for choice in choices)


@dataclass(frozen=True, slots=True)
class RowFields:
    """Reads the fields of one row by name and type; null counts as absent."""

    where: str
    values: Values
    max_characters: int

    def has(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """The text of a present field."""
        return self._check_text(name, self.values[name])

    def texts(self, *names: str) -> tuple[str, ...]:
        """The texts of the fields among `names` that are present; a single text counts as a list of one."""
        return tuple(text for name in names if self.has(name) for text in self._texts(name))

    def optional_text(self, *names: str) -> str:
        """The text of the first field among `names` that is present, or ""; an integer is converted to text."""
        for name in names:
            if self.has(name):
                value = self.values[name]
                return str(value) if _is_int(value) else self.text(name)
        return ""

    def number(self, name: str) -> float | None:
        """The finite number in a field, or None."""
        value = self.values.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value)
        ):
            raise RecordError(f"{self.where}: {name} must be a finite number, got {quote(value)}")
        return value

    def label(self, name: str) -> float | None:
        """The label in a field, 0 to 1 (true is 1, false is 0), or None."""
        return _parse_label(f"{self.where}: {name}", self.values[name]) if self.has(name) else None

    def labels(self, *names: str) -> list[float]:
        """The labels of the fields among `names` that are present; a single label counts as a list of one."""
        values: list[float] = []
        for name in filter(self.has, names):
            value = self.values[name]
            items = value if isinstance(value, list) else [value]
            values += [_parse_label(f"{self.where}: {name}[{index}]", item) for index, item in enumerate(items)]
        return values

    def integer(self, name: str, bits: int) -> int | None:
        """The integer in a field, or None."""
        value = self.values.get(name)
        if value is not None and (not _is_int(value) or abs(value) >= 2 ** (bits - 1)):
            raise RecordError(f"{self.where}: {name} must be a {bits}-bit integer, got {quote(value)}")
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        """The boolean in a field, or the default."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise RecordError(f"{self.where}: {name} must be true or false, got {quote(value)}")
        return default if value is None else value

    def names(self) -> str:
        """The names of the row's fields, for an error."""
        return column_names(self.values)

    def _texts(self, name: str) -> Iterator[str]:
        value = self.values[name]
        if isinstance(value, str):
            yield self._check_text(name, value)
        elif isinstance(value, list):
            yield from (self._check_text(f"{name}[{index}]", item) for index, item in enumerate(value))
        else:
            raise RecordError(f"{self.where}: {name} must be a string or a list of strings, got {quote(value)}")

    def _check_text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise RecordError(f"{self.where}: {name} must be a string, got {quote(value)}; put it in quotes")
        if len(value) > self.max_characters:
            remedy = "shorten it, or raise --max-characters (of preparation)"
            limit = f"the limit is {self.max_characters:,}"
            raise RecordError(f"{self.where}: {name} has {len(value):,} characters, {limit}; {remedy}")
        if problem := find_invalid_character(value):
            raise RecordError(f"{self.where}: {name} contains {problem}")
        return value


def _read_instruction(fields: RowFields) -> str:
    if "instruction" not in fields.values:
        remedy = "give the prompt under that name, or name its column: --columns instruction=COLUMN"
        raise RecordError(f"{fields.where}: has no field instruction, fields found: {fields.names()}; {remedy}")
    instruction = fields.text("instruction") if fields.has("instruction") else None
    if instruction is None or not instruction.strip():
        raise RecordError(f"{fields.where}: instruction is empty, got {quote(instruction)}; write a prompt")
    return instruction


def _read_references(fields: RowFields, *, required: bool) -> tuple[str, ...]:
    """The accepted answers; there may be none unless they are `required` to label responses."""
    if not required and not fields.has("reference") and not fields.has("references"):
        return ()
    names = [name for name in ("reference", "references") if name in fields.values]
    remedy = "give at least one accepted answer as reference or references, or --columns reference=COLUMN"
    if not names:
        raise RecordError(f"{fields.where}: has no reference, fields found: {fields.names()}; {remedy}")
    references = tuple(text for text in fields.texts(*names) if text.strip())
    if not references:
        got = quote(fields.values[names[0]])
        raise RecordError(f"{fields.where}: {names[0]} is empty, got {got}; {remedy}")
    return references


def _read_choices(fields: RowFields, references: tuple[str, ...]) -> tuple[str, ...]:
    choices = fields.texts("choices")
    if not choices:
        return ()
    if len(set(choices)) != len(choices) or len(choices) < 2 or not all(map(str.strip, choices)):
        remedy = "give at least two different texts, none of them blank"
        raise RecordError(f"{fields.where}: choices are not valid, got {quote(list(choices))}; {remedy}")
    if not set(references) & set(choices):
        problem = f"no reference is among the choices, got {quote(list(references))} and {quote(list(choices))}"
        raise RecordError(f"{fields.where}: {problem}; spell one reference exactly like a choice")
    return choices


def _read_responses(fields: RowFields) -> Iterator[Candidate]:
    """The candidates in `responses` (or `response`), each with its label in `labels` (or `label`)."""
    texts = fields.texts("response", "responses")
    if not texts and fields.has("responses"):
        raise RecordError(f"{fields.where}: responses is empty, got []; leave it out if there are none")
    labels = fields.labels("label", "labels")
    if labels and len(labels) != len(texts):
        remedy = "give one label for each response, in order"
        raise RecordError(f"{fields.where}: has {len(texts)} responses and {len(labels)} labels; {remedy}")
    for index, text in enumerate(texts):
        yield _import_candidate(text, label=labels[index] if labels else None)


def _read_candidates(fields: RowFields) -> Iterator[Candidate]:
    """Candidates given as objects (see docs/preparation.md).

    Their fields are `system` or `generator`, `text` or `response`, and those of `_CandidateDetails`.
    """
    items = fields.values.get("candidates")
    if items is None:
        return
    if not isinstance(items, list) or not items:
        remedy = "leave it out if there are none"
        raise RecordError(f"{fields.where}: candidates must be a list of objects, got {quote(items)}; {remedy}")
    for index, item in enumerate(items):
        where = f"{fields.where}: candidates[{index}]"
        if not isinstance(item, dict):
            remedy = "give plain texts in the field responses"
            raise RecordError(f"{where} must be an object, got {quote(item)}; {remedy}")
        inner = RowFields(where, item, fields.max_characters)
        yield parse_candidate(inner, ("generator", "system"), label=inner.label("label"))


def parse_candidate(fields: RowFields, generator_fields: Sequence[str], *, label: float | None = None) -> Candidate:
    """The candidate in these fields; its generator is in the first of `generator_fields` that is present.

    Raises RecordError, with the remedy, if there is no text or a field is invalid.
    """
    name = next((name for name in ("response", "text") if fields.has(name)), None)
    if name is None:
        raise RecordError(
            f"{fields.where}: has no text, fields found: {fields.names()}; give the response in the field text"
        )
    return _import_candidate(
        fields.text(name),
        label=label,
        details=_CandidateDetails(
            generator=fields.optional_text(*generator_fields),
            decoding=fields.optional_text("decoding"),
            seed=fields.integer("seed", 64),
            logprob_sum=fields.number("logprob_sum"),
            logprob_mean=fields.number("logprob_mean"),
            num_tokens=fields.integer("num_tokens", 32),
        ),
    )


class _CandidateDetails(TypedDict, total=False):
    """Fields of a candidate given as an object (see docs/preparation.md), except its text and label."""

    generator: str
    decoding: str
    seed: int | None
    logprob_sum: float | None
    logprob_mean: float | None
    num_tokens: int | None


def _import_candidate(
    response: str, *, label: float | None = None, details: _CandidateDetails | None = None
) -> Candidate:
    status: Status = "ok" if response.strip() else "empty"
    labels = {} if label is None else {GIVEN_METRIC: label}
    return complete_likelihood(
        Candidate(response=response, revision=_IMPORTED_REVISION, status=status, labels=labels, **(details or {}))
    )


def complete_likelihood(candidate: Candidate) -> Candidate:
    """The candidate with the sum of its log-probabilities computed from the mean, or the mean from the sum.

    Values that are given stay as they are; without a number of tokens above 0 nothing is computed.
    """
    total, mean, count = candidate.logprob_sum, candidate.logprob_mean, candidate.num_tokens
    if not count or count < 0:
        return candidate
    if mean is None and total is not None:
        return replace(candidate, logprob_mean=total / count)
    if total is None and mean is not None:
        return replace(candidate, logprob_sum=mean * count)
    return candidate


def is_label(value: object) -> bool:
    """Whether a value is a label: a number from 0 to 1, true or false, or one of these written as text."""
    number = _parse_number(value)
    return number is not None and 0 <= number <= 1


def _parse_label(where: str, value: object) -> float:
    number = _parse_number(value)
    if number is None or not 0 <= number <= 1:
        remedy = "give the correctness of the response, from 0 to 1, or true or false"
        raise RecordError(f"{where} is not a label, got {quote(value)}; {remedy}")
    return number


def _parse_number(value: object) -> float | None:
    """The value of a number or boolean, which may be written as text, as in CSV; None for anything else."""
    if isinstance(value, str):
        literal = {"true": 1.0, "false": 0.0}.get(value.strip().lower())
        try:
            return float(value) if literal is None else literal
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and _is_finite(value) else None


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
