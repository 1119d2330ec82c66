"""Converts instances to Arrow tables and back; columns are only ever added to the schema."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from cappy.errors import quote
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
_MAPS = ("labels", "scores")
T = TypeVar("T")


def _defaults(kind: type[Instance | Candidate]) -> dict[str, object]:
    """The value that replaces a null, by field: its default, or "" if it has none."""
    return {field.name: "" if field.default is MISSING else field.default for field in fields(kind)}


_INSTANCE_DEFAULTS = _defaults(Instance)
_CANDIDATE_DEFAULTS = _defaults(Candidate)


def find_schema_problem(schema: pa.Schema) -> str:
    """Describes what is wrong with the columns of a part; empty if they match the schema.

    Unknown columns of a newer version are ignored; columns may be missing in a part of an older version, except the
    required fields of instances and candidates.
    """
    if schema.names != list(dict.fromkeys(schema.names)):
        return "a column appears twice"
    candidates = schema.field("candidates").type if "candidates" in schema.names else None
    if candidates is not None and not (pa.types.is_list(candidates) and pa.types.is_struct(candidates.value_type)):
        return f"candidates has type {quote(str(candidates), 60)}"
    candidate_type = candidates.value_type if candidates is not None else ()
    for kind, columns, expected in (
        (Instance, list(schema), {field.name: field.type for field in SCHEMA if field.name != "candidates"}),
        (
            Candidate,
            [candidate_type[index] for index in range(len(candidate_type))],
            {field.name: field.type for field in _CANDIDATE},
        ),
    ):
        types = {field.name: field.type for field in columns}
        required = {field.name for field in fields(kind) if field.default is field.default_factory is MISSING}
        if (kind is Instance or candidates is not None) and (missing := sorted(required - types.keys())):
            return f"has no column {missing[0]}"
        for name in expected.keys() & types.keys():
            if not types[name].equals(expected[name]) and not pa.types.is_null(types[name]):
                return f"{name} has type {quote(str(types[name]), 60)}, expected {expected[name]}"
    return ""


def to_table(instances: Iterable[Instance]) -> pa.Table:
    """Converts instances to a table with one row per instance, which contains its candidates."""
    rows = list(instances)
    columns = [pa.array([getattr(row, name) for row in rows], SCHEMA.field(name).type) for name in _INSTANCE_FIELDS]
    candidates = [candidate for row in rows for candidate in row.candidates]
    struct = pa.StructArray.from_arrays(
        [pa.array(_field_values(candidates, name), _CANDIDATE.field(name).type) for name in _CANDIDATE_FIELDS],
        fields=list(_CANDIDATE),
    )
    offsets = list(itertools.accumulate((len(row.candidates) for row in rows), initial=0))
    nested = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct)
    by_name = {**dict(zip(_INSTANCE_FIELDS, columns, strict=True)), "candidates": nested}
    return pa.table([by_name[name] for name in SCHEMA.names], schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> Iterator[Instance]:
    """Yields the instances of a batch; columns that are missing in a part of an older version get their defaults.

    Reads column by column: pyarrow creates an object for every nested value of a row, which is much slower.
    """
    columns = {
        name: _read_column(batch[name], _INSTANCE_DEFAULTS[name])
        for name in _INSTANCE_FIELDS
        if name in batch.schema.names
    }
    candidates = _read_candidates(batch["candidates"]) if "candidates" in batch.schema.names else [()] * len(batch)
    for values, row_candidates in zip(zip(*columns.values(), strict=True), candidates, strict=True):
        yield Instance(**dict(zip(columns, values, strict=True)), candidates=row_candidates)


def _read_candidates(column: pa.ListArray) -> list[tuple[Candidate, ...]]:
    struct = column.flatten()
    names = [name for name in _CANDIDATE_FIELDS if struct.type.get_field_index(name) >= 0]
    columns = [_read_column(struct.field(name), _CANDIDATE_DEFAULTS[name]) for name in names]
    flat = [Candidate(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]
    return _split_flat(flat, column)


def _read_column(column: pa.Array, default: object) -> Sequence[Any]:
    """The values of a column: nulls as the default, lists as tuples, maps as mappings."""
    if pa.types.is_map(column.type):
        return _read_maps(column)
    if pa.types.is_list(column.type):
        return _split_flat(column.flatten().to_pylist(), column)
    values = column.to_pylist()
    return [default if value is None else value for value in values] if column.null_count else values


def _split_flat(flat: Sequence[T], column: pa.ListArray) -> list[tuple[T, ...]]:
    """Splits the flattened values of a list column into rows; a null list becomes an empty one."""
    lengths = pc.list_value_length(column).fill_null(0).to_pylist()
    ends = list(itertools.accumulate(lengths, initial=0))
    return [tuple(flat[start:end]) for start, end in itertools.pairwise(ends)]


def _read_maps(column: pa.MapArray) -> list[Mapping[str, float]]:
    ends = column.offsets.to_pylist()
    if not ends or ends[0] == ends[-1]:
        return [{} for _ in range(len(column))]
    keys, items = column.keys.to_pylist(), column.items.to_pylist()
    return [dict(zip(keys[start:end], items[start:end], strict=True)) for start, end in itertools.pairwise(ends)]


def _field_values(candidates: Sequence[Candidate], name: str) -> list[object]:
    values = [getattr(candidate, name) for candidate in candidates]
    return [list(value.items()) for value in values] if name in _MAPS else values
