"""Files whose columns have names of their own: which field of the record is read from which column."""

from collections.abc import Mapping, Sequence

from cappy.errors import ConfigError, RecordError, shown
from cappy.preparation.rows import Rows

FIELDS = (
    "instruction",
    "reference",
    "references",
    "choices",
    "response",
    "responses",
    "label",
    "labels",
    "candidates",
    "instance_id",
    "group_id",
    "task",
    "template",
    "original_task",
    "split",
)
"""What a column can be read as."""


def parse(pairs: Sequence[str]) -> dict[str, str]:
    """Field -> column, from FIELD=COLUMN words; ConfigError for another form, an unknown or repeated field."""
    columns: dict[str, str] = {}
    for pair in pairs:
        field, equals, column = pair.partition("=")
        if not equals or not column:
            raise ConfigError(
                f"preparation: --columns: {shown(pair)} is not FIELD=COLUMN, such as instruction=question"
            )
        if field not in FIELDS:
            raise ConfigError(f"preparation: --columns: no field {shown(field)}; choose of {', '.join(FIELDS)}")
        if field in columns:
            both = f"{shown(columns[field])} and {shown(column)}"
            raise ConfigError(f"preparation: --columns: {field} is read from one column, got {both}")
        columns[field] = column
    return columns


def mapped(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """The rows with every field of `columns` read from its column; RecordError where a row lacks one."""
    for where, values in rows:
        for field, column in columns.items():
            if column not in values:
                found = shown(", ".join(map(str, values)) or "none", limit=120)
                remedy = f"mend --columns {field}={column}"
                raise RecordError(f"{where}: has no column {shown(column)}, columns found: {found}; {remedy}")
        read = {field: values[column] for field, column in columns.items()}
        # Two spellings of one field: where one is read from a column, what stands under the other is not meant.
        hidden = {"reference", "references"} if {"reference", "references"} & set(columns) else set()
        yield where, {**{name: value for name, value in values.items() if name not in hidden}, **read}
