"""JSON Lines of a user's own, one object per line."""

import json
from pathlib import Path

from cappy.errors import RecordError, shown
from cappy.preparation.lines import lines
from cappy.preparation.rows import Rows, Values


def read_json_lines(path: Path) -> Rows:
    """The objects of a file, blank lines left out; RecordError names the line that holds none."""
    for number, text in lines(path):
        if text.strip():
            where = f"{path}:{number}"
            yield where, _object(where, text)


def _object(where: str, text: str) -> Values:
    remedy = 'write one object per line: {"instruction": "...", "reference": "..."}'
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"{where}: is not JSON ({reason}), got {shown(text.strip())}; {remedy}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{where}: must be a JSON object, got {shown(value)}; {remedy}")
    return value
