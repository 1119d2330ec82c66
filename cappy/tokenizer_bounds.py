"""Limits on the tokenizer in a model's folder: a file of one kilobyte can expand a sentence to gigabytes.

The loaded tokenizer is checked, without its vocabulary, before it processes any text.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cappy.errors import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_GROWTH = 64
"""Factor by which all replacements of a normalizer together may lengthen a text."""
MAX_COMPONENTS = 64
"""Maximum components of a normalizer, a pre-tokenizer, a post-processor or a decoder; known ones have up to a dozen."""
MAX_INSERTED_CHARACTERS = 256
"""Maximum characters that a component may insert into every text, or before every word."""
MAX_WORD_CHARACTERS = 1_000
"""Longest word that WordPiece splits: its time is quadratic in the length."""

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SEQUENCE_KEYS = ("normalizers", "pretokenizers", "processors", "decoders")
_TOKEN_KEYS = ("single", "pair", "special_tokens", "ids", "tokens")


def check_text_growth(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError if a component lengthens texts too much; a pure Python tokenizer has no components."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for name in _PARTS if backend is not None else ():
        part = getattr(backend, name)
        if part is not None:
            _check_part(name, json.loads(part.__getstate__()))
    model = getattr(backend, "model", None)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        _check_text(name, getattr(model, name, None) or "")
    if (getattr(model, "max_input_chars_per_word", None) or 0) > MAX_WORD_CHARACTERS:
        raise ValueError(f"its max_input_chars_per_word is above {MAX_WORD_CHARACTERS:,}")


def _check_part(name: str, state: object) -> None:
    growth = 1.0
    for count, component in enumerate(_components(state), start=1):
        if count > MAX_COMPONENTS:
            raise ValueError(f"its {name} has more than {MAX_COMPONENTS} components")
        for key, value in component.items():
            if key in _TOKEN_KEYS and isinstance(value, list | dict) and len(value) > MAX_COMPONENTS:
                raise ValueError(f"its {name} adds {len(value):,} tokens to every text")
            if isinstance(value, str) and key not in ("precompiled_charsmap", "Regex", "type"):
                _check_text(f"{name}.{key}", value)
        if component.get("type") == "Replace":
            growth *= _max_growth(component)
        if growth > MAX_GROWTH:
            raise ValueError(f"its {name} makes texts up to {growth:,.0f} times longer")
        if component.get("precompiled_charsmap"):
            _check_charsmap(name, component["precompiled_charsmap"])


def _components(state: object) -> Iterator[Mapping[str, Any]]:
    """All components of nested sequences, and their special tokens."""
    pending = [state]
    while pending:
        component = pending.pop()
        if isinstance(component, Mapping):
            yield component
            pending += [item for name in _SEQUENCE_KEYS for item in component.get(name) or ()]
            if isinstance(tokens := component.get("special_tokens"), Mapping):
                pending += list(tokens.values())[: MAX_COMPONENTS + 1]


def _max_growth(component: Mapping[str, Any]) -> float:
    """Factor by which a replacement can lengthen a text; a regex may match between any two characters."""
    content, pattern = component.get("content", ""), component.get("pattern", {})
    text = pattern.get("String", "") if isinstance(pattern, Mapping) else ""
    return max(1.0, len(content) / len(text) if text else 1.0 + len(content) if len(content) > 1 else 1.0)


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_INSERTED_CHARACTERS:
        raise ValueError(f"its {name} has {len(text):,} characters ({quote(text, 20)})")


def _check_charsmap(name: str, text: str) -> None:
    """Checks the replacement texts of a charsmap. Its layout is: size of the trie, trie, NUL-terminated texts."""
    data = base64.b64decode(text)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    if (longest := max(map(len, texts.split(b"\0")))) > MAX_INSERTED_CHARACTERS:
        raise ValueError(f"its {name} replaces a character by {longest:,} bytes")
