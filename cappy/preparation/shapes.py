"""Datasets that come as prompts, known by their columns: P3, and BIG-bench as `tasksource/bigbench` has it."""

from cappy.errors import RecordError, shown
from cappy.preparation.prompted import distinct_choices, texts
from cappy.preparation.rows import Rows, Values

_P3 = {"inputs_pretokenized", "targets_pretokenized"}
_BIGBENCH = {"inputs", "targets", "multiple_choice_targets"}


_SPENT = frozenset(("inputs", "targets", "idx", "weight", "multiple_choice_scores", "answer_choices", "is_correct"))
"""Columns of these datasets that say again, or count, what the others say."""


def known(rows: Rows) -> Rows:
    """The rows with the fields of the record, where their columns are known; others as they are.

    P3's rows of a rank-classification evaluation stand once for each choice: those of the wrong ones are left out,
    because every row lists all choices.
    """
    for where, values in rows:
        if "instruction" in values:
            yield where, values
        elif values.keys() >= _P3:
            if values.get("is_correct", True):
                yield where, {**_others(values, _P3), **_from_p3(where, values)}
        elif values.keys() >= _BIGBENCH:
            yield where, {**_others(values, _BIGBENCH), **from_bigbench(where, values)}
        else:
            yield where, values


def _others(values: Values, read: set[str]) -> Values:
    """The columns that the shape does not know."""
    return {name: value for name, value in values.items() if name not in read and name not in _SPENT}


def from_bigbench(where: str, values: Values) -> Values:
    """The fields of a row of tasksource/bigbench."""
    references = texts(where, values, "targets")
    choices = distinct_choices(texts(where, values, "multiple_choice_targets"), references)
    return {"instruction": values["inputs"], "references": list(references), "choices": list(choices)}


def _from_p3(where: str, values: Values) -> Values:
    """The fields of a row of P3, whose texts have blanks around them."""
    for name in _P3:
        if not isinstance(values[name], str):
            raise RecordError(f"{where}: {name} must be a text, got {shown(values[name])}; choose another dataset")
    target = values["targets_pretokenized"].strip()
    listed = texts(where, values, "answer_choices") if values.get("answer_choices") else ()
    choices = distinct_choices([choice.strip() for choice in listed], [target])
    return {"instruction": values["inputs_pretokenized"].strip(), "reference": target, "choices": list(choices)}
