"""A row of a source, from its fields to an instance; every error names where the row stands and the field."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeGuard

from cappy.errors import RecordError, quote
from cappy.records import Candidate, Instance, prompt_hash
from cappy.records.instance import GIVEN, SPLITS, Status

Values = Mapping[str, object]
Rows = Iterator[tuple[str, Values]]
"""Where each row stands (file:line), and its fields by name."""

_IMPORTED = "imported"
"""Revision of candidates that were sampled elsewhere."""


@dataclass(frozen=True, slots=True)
class Row:
    """An instance at `where`. Its id and its split are placeholders unless they were given."""

    where: str
    instance: Instance
    has_id: bool = True
    has_split: bool = True


def hash64(text: str) -> int:
    """64 bits of blake2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def odd_character(text: str) -> str:
    """What of a text no file of the record takes, and what to do with it; empty where there is nothing."""
    if "\0" in text:
        return f"a NUL (character {text.index(chr(0)) + 1}); delete it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a character ({quote(text[error.start])}, character {error.start + 1})"
        return f"{half}; delete it or write the whole one"
    return ""


def column_names(names: Iterable[object], limit: int = 120) -> str:
    """Names of columns for a message of so many characters; pandas writes its index without a name."""
    return quote(", ".join(str(name) or "(no name)" for name in names) or "none", limit)


def parse_row(where: str, values: Values, *, task: str, max_characters: int, unlabelled: bool = False) -> Row:
    """The instance in the fields of a row; RecordError says which field is wrong and how to mend it.

    An `unlabelled` row needs responses and no reference.
    """
    fields = _Fields(where, values, max_characters)
    instruction = _instruction(fields)
    candidates = (*_responses(fields), *_candidates(fields))
    if unlabelled and not candidates:
        remedy = "give the responses to be scored as responses, or leave --unlabelled out"
        raise RecordError(f"{where}: has no responses, fields found: {fields.names()}; {remedy}")
    rated = bool(candidates) and all(GIVEN in one.labels for one in candidates)
    references = _references(fields, needed=not rated and not unlabelled)
    choices = _choices(fields, references)
    instance_id = fields.optional("instance_id", "id")
    split = fields.optional("split")
    if split and split not in SPLITS:
        raise RecordError(f"{where}: split must be one of {', '.join(SPLITS)}, got {quote(split)}; rename it")
    instance = Instance(
        instance_id=instance_id,
        group_id=fields.optional("group_id") or f"{prompt_hash(instruction):016x}",
        task=fields.optional("task") or task,
        template=fields.optional("template"),
        original_task=fields.flag("original_task", default=True),
        split=split or SPLITS[0],
        instruction=instruction,
        references=references,
        choices=choices,
        candidates=candidates or choice_candidates(choices),
    )
    return Row(where, instance, has_id=bool(instance_id), has_split=bool(split))


def choice_candidates(choices: Sequence[str]) -> tuple[Candidate, ...]:
    """One candidate for each choice, in order."""
    return tuple(Candidate(response=choice, source="choice") for choice in choices)


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of one row, read by name and type; null counts as absent."""

    where: str
    values: Values
    max_characters: int

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """The text of a field that is there."""
        return self._check_text(name, self.values[name])

    def texts(self, *names: str) -> tuple[str, ...]:
        """The texts of these fields that are there; a text alone counts as a list of one."""
        return tuple(text for name in names if self.has(name) for text in self._texts(name))

    def optional(self, *names: str) -> str:
        """The text of the first of these fields that is there, or an empty one; a whole number counts as its digits."""
        for name in names:
            if self.has(name):
                value = self.values[name]
                return str(value) if _is_int(value) else self.text(name)
        return ""

    def number(self, name: str) -> float | None:
        """The finite number in a field, or None."""
        value = self.values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
            raise RecordError(f"{self.where}: {name} must be a finite number, got {quote(value)}")
        return value

    def label(self, name: str) -> float | None:
        """The label in a field, 0 to 1, true or false counting as 1 or 0; or None."""
        return _label(f"{self.where}: {name}", self.values[name]) if self.has(name) else None

    def labels(self, *names: str) -> list[float]:
        """The labels in these fields that are there; one alone counts as a list of one."""
        values: list[float] = []
        for name in filter(self.has, names):
            value = self.values[name]
            items = value if isinstance(value, list) else [value]
            values += [_label(f"{self.where}: {name}[{index}]", item) for index, item in enumerate(items)]
        return values

    def whole(self, name: str, bits: int) -> int | None:
        """The whole number in a field, or None."""
        value = self.values.get(name)
        if value is not None and (not _is_int(value) or abs(value) >= 2 ** (bits - 1)):
            raise RecordError(f"{self.where}: {name} must be a whole number of {bits} bits, got {quote(value)}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """The true or false in a field, or the default."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise RecordError(f"{self.where}: {name} must be true or false, got {quote(value)}")
        return default if value is None else value

    def names(self) -> str:
        """The names of the fields that are there, for an error."""
        return column_names(self.values)

    def _texts(self, name: str) -> Iterator[str]:
        value = self.values[name]
        if isinstance(value, str):
            yield self._check_text(name, value)
        elif isinstance(value, list):
            yield from (self._check_text(f"{name}[{index}]", item) for index, item in enumerate(value))
        else:
            raise RecordError(f"{self.where}: {name} must be a text or a list of texts, got {quote(value)}")

    def _check_text(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise RecordError(f"{self.where}: {name} must be a text, got {quote(value)}; put it in quotes")
        if len(value) > self.max_characters:
            remedy = "shorten it, or raise --max-characters (of preparation)"
            limit = f"the limit is {self.max_characters:,}"
            raise RecordError(f"{self.where}: {name} has {len(value):,} characters, {limit}; {remedy}")
        if odd := odd_character(value):
            raise RecordError(f"{self.where}: {name} holds {odd}")
        return value


def _instruction(fields: _Fields) -> str:
    if "instruction" not in fields.values:
        remedy = "give the prompt under that name, or say which column it is: --columns instruction=COLUMN"
        raise RecordError(f"{fields.where}: has no field instruction, fields found: {fields.names()}; {remedy}")
    instruction = fields.text("instruction") if fields.has("instruction") else None
    if instruction is None or not instruction.strip():
        raise RecordError(f"{fields.where}: instruction is empty, got {quote(instruction)}; give it a text")
    return instruction


def _references(fields: _Fields, *, needed: bool) -> tuple[str, ...]:
    """The accepted answers; there may be none where every response brought its label or has none to get."""
    if not needed and not fields.has("reference") and not fields.has("references"):
        return ()
    given = [name for name in ("reference", "references") if name in fields.values]
    remedy = "give at least one accepted answer as reference or references, or --columns reference=COLUMN"
    if not given:
        raise RecordError(f"{fields.where}: has no reference, fields found: {fields.names()}; {remedy}")
    references = tuple(text for text in fields.texts(*given) if text.strip())
    if not references:
        got = quote(fields.values[given[0]])
        raise RecordError(f"{fields.where}: {given[0]} holds no text, got {got}; {remedy}")
    return references


def _choices(fields: _Fields, references: tuple[str, ...]) -> tuple[str, ...]:
    choices = fields.texts("choices")
    if not choices:
        return ()
    if len(set(choices)) != len(choices) or len(choices) < 2 or not all(map(str.strip, choices)):
        remedy = "give at least two different texts, none of them blank"
        raise RecordError(f"{fields.where}: choices are not a choice, got {quote(list(choices))}; {remedy}")
    if not set(references) & set(choices):
        wrong = f"no reference is among the choices, got {quote(list(references))} and {quote(list(choices))}"
        raise RecordError(f"{fields.where}: {wrong}; spell one of them as a choice is spelt")
    return choices


def _responses(fields: _Fields) -> Iterator[Candidate]:
    """The candidates of `responses` (or `response`), each with the label beside it in `labels` (or `label`)."""
    texts = fields.texts("response", "responses")
    if not texts and fields.has("responses"):
        raise RecordError(f"{fields.where}: responses holds no text, got []; leave it out where there are none")
    labels = fields.labels("label", "labels")
    if labels and len(labels) != len(texts):
        remedy = "give one label for each response, in order"
        raise RecordError(f"{fields.where}: has {len(texts)} responses and {len(labels)} labels; {remedy}")
    for index, text in enumerate(texts):
        yield _import_candidate(text, label=labels[index] if labels else None)


def _candidates(fields: _Fields) -> Iterator[Candidate]:
    """Candidates in the exchange form: `system` or `generator`, `text` or `response`, and what else a record keeps."""
    items = fields.values.get("candidates")
    if items is None:
        return
    if not isinstance(items, list) or not items:
        remedy = "leave it out where there are none"
        raise RecordError(f"{fields.where}: candidates must be a list of objects, got {quote(items)}; {remedy}")
    for index, item in enumerate(items):
        where = f"{fields.where}: candidates[{index}]"
        if not isinstance(item, dict):
            remedy = "plain texts belong under responses"
            raise RecordError(f"{where} must be an object, got {quote(item)}; {remedy}")
        inner = _Fields(where, item, fields.max_characters)
        name = next((name for name in ("response", "text") if inner.has(name)), None)
        if name is None:
            raise RecordError(f"{where}: has no text, fields found: {inner.names()}; give the response as text")
        yield _import_candidate(
            inner.text(name),
            label=inner.label("label"),
            known=_Known(
                generator=inner.optional("generator", "system"),
                decoding=inner.optional("decoding"),
                seed=inner.whole("seed", 64),
                logprob_sum=inner.number("logprob_sum"),
                logprob_mean=inner.number("logprob_mean"),
                num_tokens=inner.whole("num_tokens", 32),
            ),
        )


class _Known(TypedDict, total=False):
    """What the exchange form may say of a candidate beside its text and label."""

    generator: str
    decoding: str
    seed: int | None
    logprob_sum: float | None
    logprob_mean: float | None
    num_tokens: int | None


def _import_candidate(response: str, *, label: float | None = None, known: _Known | None = None) -> Candidate:
    status: Status = "ok" if response.strip() else "empty"
    labels = {} if label is None else {GIVEN: label}
    return Candidate(response=response, revision=_IMPORTED, status=status, labels=labels, **(known or {}))


def is_label(value: object) -> bool:
    """Whether a value is a label: a number from 0 to 1, true or false, or the text of one."""
    number = _number(value)
    return number is not None and 0 <= number <= 1


def _label(where: str, value: object) -> float:
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        remedy = "give how correct the response is, from 0 to 1, or true or false"
        raise RecordError(f"{where} is not a label, got {quote(value)}; {remedy}")
    return number


def _number(value: object) -> float | None:
    """A number, a truth value, or the text of one: cells of CSV are texts."""
    if isinstance(value, str):
        known = {"true": 1.0, "false": 0.0}.get(value.strip().lower())
        try:
            return float(value) if known is None else known
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and _finite(value) else None


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
