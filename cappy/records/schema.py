"""Instances as Arrow tables and back; the schema only grows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import pyarrow as pa

from cappy.records.instance import Candidate, Instance

SCHEMA_VERSION = 1

_CANDIDATE = pa.struct(
    [
        ("response", pa.string()),
        ("source", pa.string()),
        ("generator", pa.string()),
        ("revision", pa.string()),
        ("decoding", pa.string()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("logprob_sum", pa.float64()),
        ("logprob_mean", pa.float64()),
        ("num_tokens", pa.int32()),
        ("labels", pa.map_(pa.string(), pa.float64())),
        ("scores", pa.map_(pa.string(), pa.float64())),
    ]
)

SCHEMA = pa.schema(
    [
        ("instance_id", pa.string()),
        ("group_id", pa.string()),
        ("task", pa.string()),
        ("template", pa.string()),
        ("original_task", pa.bool_()),
        ("split", pa.string()),
        ("instruction", pa.string()),
        ("references", pa.list_(pa.string())),
        ("choices", pa.list_(pa.string())),
        ("candidates", pa.list_(_CANDIDATE)),
    ]
)

_CANDIDATE_FIELDS = tuple(field.name for field in fields(Candidate))
_INSTANCE_FIELDS = tuple(field.name for field in fields(Instance) if field.name != "candidates")


def to_table(instances: Iterable[Instance]) -> pa.Table:
    """One row per instance, its candidates nested."""
    return pa.Table.from_pylist([_row(instance) for instance in instances], schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> Iterator[Instance]:
    """The instances of a batch; columns that an older writer did not know keep their defaults."""
    for row in batch.to_pylist(maps_as_pydicts="strict"):
        yield _instance(row)


def _row(instance: Instance) -> dict[str, Any]:
    row = {name: getattr(instance, name) for name in _INSTANCE_FIELDS}
    row["candidates"] = [
        {name: getattr(candidate, name) for name in _CANDIDATE_FIELDS} for candidate in instance.candidates
    ]
    return row


def _instance(row: Mapping[str, Any]) -> Instance:
    values = {name: row[name] for name in _INSTANCE_FIELDS if row.get(name) is not None}
    values["references"] = tuple(values.get("references", ()))
    values["choices"] = tuple(values.get("choices", ()))
    candidates = (
        Candidate(**{name: value for name, value in candidate.items() if value is not None})
        for candidate in row.get("candidates") or ()
    )
    return Instance(**values, candidates=tuple(candidates))
