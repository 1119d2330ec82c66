"""A file of decodings: a list in YAML or JSON, each a word of the grammar or the knobs by name.

- greedy
- topk40x4
- {name: warm, num_samples: 4, temperature: 1.3, min_p: 0.05, max_new_tokens: 128}
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from cappy.errors import ConfigError, shown
from cappy.sampling.strategies import MAX_NEW_TOKENS, Decoding, checked, parse_decoding
from cappy.yaml_files import load_yaml

_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "do_sample": (bool,),
    "temperature": (float, int),
    "top_p": (float, int),
    "min_p": (float, int),
}
"""Types of the knobs that are no whole numbers."""
_MOST_BYTES = 1_000_000


def read_decodings(path: Path, length: int = MAX_NEW_TOKENS) -> tuple[Decoding, ...]:
    """The decodings of a file; ConfigError names the file, the entry, the knob and the value.

    `length` is the longest response in tokens of entries that state none.
    """
    entries = _read(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: must be a list of decodings, got {shown(entries)}; see --strategy for their names")
    return checked([_decoding(path, number, entry, length) for number, entry in enumerate(entries, 1)], str(path))


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path}: is larger than {_MOST_BYTES} bytes, so it is no file of decodings")
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); --strategy names a file of decodings") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # A value that is not what its tag says raises whatever its reader trips over.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{path}:{line} is neither YAML nor JSON ({shown(reason)}); mend it") from error


def _decoding(path: Path, number: int, entry: Any, length: int) -> Decoding:
    where = f"{path}: decoding {number}"
    if isinstance(entry, str):
        try:
            return replace(parse_decoding(entry), max_new_tokens=length)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(f"{where}: must be a word as topk40x4 or knobs with a name, got {shown(entry)}")
    known = [field.name for field in fields(Decoding)]
    for knob, value in entry.items():
        if knob not in known:
            raise ConfigError(f"{where}: {shown(knob)} is no knob; they are {', '.join(known)}")
        wanted = _TYPES.get(knob, (int,))
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise ConfigError(f"{where}: {knob} must be {_said(wanted)}, got {shown(value)}")
    if not entry["name"].strip():
        raise ConfigError(f"{where}: name is empty; candidates are told apart by it")
    return Decoding(**{"max_new_tokens": length, **entry})


def _said(wanted: tuple[type, ...]) -> str:
    return {str: "a text", bool: "true or false", float: "a number", int: "a whole number"}[wanted[0]]
