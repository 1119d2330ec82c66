"""Every field of the record survives the disk, and the schema only grows."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import raises_naming

from cappy.errors import RecordError
from cappy.records.instance import SOURCES, SPLITS, STATUSES, Candidate, Instance, prompt_hash
from cappy.records.schema import SCHEMA, from_batch, to_table

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
full = texts.map(lambda text: f"{text}.")
numbers = st.floats(allow_nan=False)
metrics = st.dictionaries(texts, numbers, max_size=3)
candidates = st.builds(
    Candidate,
    response=texts,
    source=st.sampled_from(SOURCES),
    generator=texts,
    revision=texts,
    decoding=texts,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    status=st.sampled_from(STATUSES),
    logprob_sum=st.none() | numbers,
    logprob_mean=st.none() | numbers,
    num_tokens=st.none() | st.integers(0, 2**31 - 1),
    labels=metrics,
    scores=metrics,
)
instances = st.builds(
    Instance,
    instance_id=full,
    instruction=full,
    references=st.lists(full, min_size=1, max_size=3).map(tuple),
    group_id=full,
    task=texts,
    template=texts,
    original_task=st.booleans(),
    split=st.sampled_from(SPLITS),
    choices=st.lists(texts, max_size=3).map(tuple),
    candidates=st.lists(candidates, max_size=3).map(tuple),
)


def back(table: pa.Table) -> list[Instance]:
    return [instance for batch in table.to_batches() for instance in from_batch(batch)]


@given(st.lists(instances, max_size=4))
def test_every_field_survives_the_round_trip(given_instances: list[Instance]) -> None:
    assert back(to_table(given_instances)) == given_instances


def test_every_field_of_the_record_has_a_column() -> None:
    candidate = SCHEMA.field("candidates").type.value_type
    assert set(SCHEMA.names) == set(Instance.__dataclass_fields__)
    assert {field.name for field in candidate} == set(Candidate.__dataclass_fields__)


@pytest.mark.parametrize("column", sorted(set(SCHEMA.names) - {"instance_id", "instruction", "references"}))
def test_a_part_written_before_a_column_was_added_reads_with_its_default(column: str) -> None:
    instance = Instance(
        instance_id="a",
        instruction="i",
        references=("r",),
        group_id="g",
        task="t",
        template="p",
        original_task=False,
        split="test",
        choices=("r", "s"),
        candidates=(Candidate(response="r"),),
    )
    default: Any = getattr(Instance(instance_id="a", instruction="i", references=("r",)), column)
    (old,) = back(to_table([instance]).drop_columns([column]))
    assert getattr(old, column) == default != getattr(instance, column)
    assert all(getattr(old, name) == getattr(instance, name) for name in SCHEMA.names if name != column)


def test_a_candidate_written_before_a_field_was_added_reads_with_its_default() -> None:
    rows = [{"instance_id": "a", "instruction": "i", "references": ["r"], "candidates": [{"response": "x"}]}]
    (old,) = back(pa.Table.from_pylist(rows))
    assert old.candidates == (Candidate(response="x"),)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"instruction": " \n"}, ("instruction is empty",)),
        ({"references": ("", " ")}, ("no reference", "at least one")),
        ({"references": ()}, ("no reference", "at least one")),
        ({"split": "dev"}, ("split", "train, validation, test", "got 'dev'")),
    ],
)
def test_an_instance_that_could_not_be_judged_cannot_be_made(values: dict[str, Any], parts: Any) -> None:
    with raises_naming(RecordError, "instance 'a': ", *parts):
        Instance(**{"instance_id": "a", "instruction": "i", "references": ("r",), **values})


def test_a_candidate_of_an_unknown_source_or_status_cannot_be_made() -> None:
    with raises_naming(RecordError, "source", "reference, choice, mismatch, llm", "got 'gold'"):
        Candidate(response="x", source="gold")  # type: ignore[arg-type]
    statuses = "ok, empty, refused, failed, truncated, filtered"
    with raises_naming(RecordError, "status", statuses, "got 'late'"):
        Candidate(response="x", status="late")  # type: ignore[arg-type]


def test_an_instance_without_a_group_is_its_own_group() -> None:
    assert Instance(instance_id="a", instruction="i", references=("r",)).group_id == "a"


def test_a_selector_sees_sampled_responses_and_choices_that_a_user_would_have_and_nothing_else() -> None:
    pool = tuple(Candidate(response="x", source=source, status=status) for source in SOURCES for status in STATUSES)
    instance = Instance(instance_id="a", instruction="i", references=("r",), candidates=pool)
    seen = {(source, status) for source in ("llm", "choice") for status in ("ok", "truncated")}
    assert {(c.source, c.status) for c in instance.selectable} == seen


@given(texts, texts)
def test_prompts_that_differ_only_in_case_white_space_or_unicode_form_hash_alike(left: str, right: str) -> None:
    assert prompt_hash(f"{left} {right}") == prompt_hash(f"  {left}\n\t{right} ")
    assert prompt_hash("Add \u00e9 \ufb01") == prompt_hash("ADD e\u0301 fi") != prompt_hash("Add e fi")
    assert 0 <= prompt_hash(left) < 2**64


@given(candidates, texts, numbers)
def test_a_label_changes_nothing_else(candidate: Candidate, metric: str, label: float) -> None:
    assert candidate.with_label(metric, label) == replace(candidate, labels={**candidate.labels, metric: label})
