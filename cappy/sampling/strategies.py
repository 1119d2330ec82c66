"""Decoding strategies: by name, by a small grammar, or from a file.

A strategy is one or more decodings joined by `+`, such as `beam4+topk40x4`:

greedy                  the most probable token at every step
beamN, beamNxM          beam search with N beams: the best beam, or the M best
samplingN               N samples at temperature 1 without filters
temperatureT, topkK,    one sample with this parameter; `xN` at the end draws N samples, `-` joins parameters:
toppP, minpP            `temperature0.7-topp0.9x4`

A file of decodings is a list in YAML or JSON. Each entry is a word of this grammar or has the parameters by name:

- greedy
- topk40x4
- {name: warm, num_samples: 4, temperature: 1.3, min_p: 0.05, max_new_tokens: 128}

A decoding sets every parameter, so that no default of a model's own generation config applies.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from cappy.errors import ConfigError, quote
from cappy.untrusted import load_yaml

MAX_NEW_TOKENS = 64
ENDPOINT_NEW_TOKENS = 512
"""Default for chat models, which answer in paragraphs: 64 tokens would truncate nearly every response."""
MAX_NEW_TOKENS_LIMIT = 32768
FILES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """The parameters for drawing `num_samples` responses for an instruction.

    `top_k` 0, `top_p` 1 and `min_p` 0 turn these filters off. With `do_sample` false the responses are the best of
    `num_beams` beams (greedy for one beam). The end token is only allowed after `min_new_tokens` tokens. `generator` is
    the position, from 0, of the only generator that uses this decoding; None: all of them.
    """

    name: str
    num_samples: int = 1
    do_sample: bool = True
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    max_new_tokens: int = MAX_NEW_TOKENS
    generator: int | None = None


GREEDY = Decoding(name="greedy", do_sample=False)
BEAM4 = Decoding(name="beam4", do_sample=False, num_beams=4)


def _paper17_leaky() -> tuple[Decoding, ...]:
    """The 17 candidates as the published code drew them (docs/guides/paper.md); for comparison, not as baselines.

    The library of the published code applied top-k 50 to every call that set no other value, so `sampling`,
    `temperature0.9` and `topp0.95` had it too. The lengths are also those of its calls, which count the start token:
    at most 63 new tokens, and no end token among the first three.
    """
    return tuple(
        Decoding(
            name=f"{decoding.name}-leaky",
            num_samples=decoding.num_samples,
            do_sample=decoding.do_sample,
            num_beams=decoding.num_beams,
            temperature=decoding.temperature,
            top_k=(decoding.top_k or 50) if decoding.do_sample else 0,
            top_p=decoding.top_p,
            min_new_tokens=3,
            max_new_tokens=63,
        )
        for decoding in _PAPER17
    )


def _paper_pretrain() -> tuple[Decoding, ...]:
    """Five samples from each of two generators (docs/guides/paper.md): a reconstruction, not a published setting.

    The number of samples and the filter of each generator (top-k for the first, BART0; top-p for the second, T0-3B)
    are from memory, not looked up; the values 40 and 0.95 are those of the finetuning code. As in the sampling step,
    only templates without choices were sampled from.
    """
    return (
        Decoding(name="topk40", num_samples=5, top_k=40, generator=0),
        Decoding(name="topp0.95", num_samples=5, top_p=0.95, generator=1),
    )


_PAPER17 = (
    BEAM4,
    Decoding(name="sampling", num_samples=4),
    Decoding(name="temperature0.9", num_samples=4, temperature=0.9),
    Decoding(name="topk40", num_samples=4, top_k=40),
    Decoding(name="topp0.95", num_samples=4, top_p=0.95),
)

STRATEGIES: Mapping[str, tuple[Decoding, ...]] = {
    "greedy": (GREEDY,),
    "sampling8": (Decoding(name="sampling", num_samples=8),),
    "paper17": _PAPER17,
    "paper17-leaky": _paper17_leaky(),
    "paper-pretrain": _paper_pretrain(),
    "endpoint8": (
        Decoding(name="temperature0", do_sample=False),
        Decoding(name="sampling", num_samples=4),
        Decoding(name="topp0.95", num_samples=3, top_p=0.95),
    ),
}
"""`paper17` is the 17-candidate scheme of Cappy (generation script of the reference code) without its top-k 50 leak."""

GRAMMAR = (
    "greedy, beamN, samplingN, temperatureTxN, topkKxN, toppPxN or minpPxN, joined by +, such as beam4+topk40x4; or a "
    f"file of decodings ({', '.join(FILES)})"
)
_NUMBER = "[0-9]{1,9}"
_DECIMAL = rf"{_NUMBER}(?:\.[0-9]{{1,9}})?"
_PARAMETER = rf"(?:topk{_NUMBER}|(?:temperature|topp|minp){_DECIMAL})"
_BEAM = re.compile(rf"beam({_NUMBER})(?:x({_NUMBER}))?")
_SAMPLING = re.compile(rf"sampling({_NUMBER})")
_PARAMETERS = re.compile(rf"({_PARAMETER}(?:-{_PARAMETER})*)(?:x({_NUMBER}))?")


def default_strategy(kind: str) -> str:
    """The default strategy for a kind of generator (see `cappy.specs`), one that this kind supports.

    Each has a greedy response: it is what a user has without selection, and the selector may use it.
    """
    return "endpoint8" if kind in ("openai", "vllm") else "greedy+paper17"


def default_length(kind: str) -> int:
    """The default maximum number of new tokens for a kind of generator."""
    return ENDPOINT_NEW_TOKENS if kind == "openai" else MAX_NEW_TOKENS


def parse_strategy(text: str, length: int = MAX_NEW_TOKENS) -> tuple[Decoding, ...]:
    """Parses a strategy: a name, an expression or a file.

    `length` is the maximum number of new tokens for decodings that do not set one. Raises ConfigError, which lists the
    names and the grammar, if the text is not a strategy.
    """
    if text.endswith(FILES):
        return read_decodings(Path(text), length)
    # In the built-in strategies and expressions `MAX_NEW_TOKENS` only occurs as the default.
    return tuple(
        replace(decoding, max_new_tokens=length) if decoding.max_new_tokens == MAX_NEW_TOKENS else decoding
        for decoding in _parse_expression(text)
    )


def _parse_expression(text: str) -> tuple[Decoding, ...]:
    if text in STRATEGIES:
        return STRATEGIES[text]
    decodings = tuple(
        decoding for word in text.split("+") for decoding in STRATEGIES.get(word) or (_parse_decoding(word, text),)
    )
    return check_decodings(decodings, f"sampling: --strategy {quote(text)}")


def decodings_of(decodings: Sequence[Decoding], position: int) -> tuple[Decoding, ...]:
    """The decodings that the generator at this position, from 0, uses."""
    return tuple(decoding for decoding in decodings if decoding.generator in (None, position))


def _parse_decoding(word: str, text: str = "") -> Decoding:
    """Parses one word of the grammar; `text` is the whole strategy, for the error message."""
    if word == "greedy":
        return GREEDY
    if match := _BEAM.fullmatch(word):
        return Decoding(
            name=f"beam{match[1]}", do_sample=False, num_beams=int(match[1]), num_samples=int(match[2] or 1)
        )
    if match := _SAMPLING.fullmatch(word):
        return Decoding(name="sampling", num_samples=int(match[1]))
    match = _PARAMETERS.fullmatch(word)
    parameters = dict(re.findall(r"([a-z]+)([0-9.]+)", match[1])) if match else {}
    if match and len(parameters) == match[1].count("-") + 1:
        return Decoding(
            name=match[1],
            num_samples=int(match[2] or 1),
            temperature=float(parameters.get("temperature", 1)),
            top_k=int(parameters.get("topk", 0)),
            top_p=float(parameters.get("topp", 1)),
            min_p=float(parameters.get("minp", 0)),
        )
    location = f" in {quote(text)}" if text and text != word else ""
    raise ConfigError(
        f"sampling: --strategy: {quote(word)}{location} is unknown; choose one of {', '.join(STRATEGIES)}, or {GRAMMAR}"
    )


def check_decodings(decodings: Sequence[Decoding], prefix: str) -> tuple[Decoding, ...]:
    """Returns the decodings. Raises ConfigError if a parameter is out of range or a name is used twice."""
    for decoding in decodings:
        broken_rule = next((rule for rule, holds in _rules(decoding).items() if not holds), None)
        if broken_rule:
            raise ConfigError(f"{prefix}: decoding {quote(decoding.name)}: {broken_rule}")
    counts = Counter((decoding.name, decoding.generator) for decoding in decodings)
    shared_names = {name for name, generator in counts if generator is None}
    duplicate = next(
        (
            name
            for (name, generator), count in counts.items()
            if count > 1 or (generator is not None and name in shared_names)
        ),
        None,
    )
    if duplicate is not None:
        raise ConfigError(f"{prefix}: {quote(duplicate)} is used twice; draw all its samples in one decoding")
    return tuple(decodings)


def _rules(decoding: Decoding) -> dict[str, bool]:
    unfiltered = (decoding.temperature, decoding.top_k, decoding.top_p, decoding.min_p) == (1.0, 0, 1.0, 0.0)
    return {
        "num_samples must be 1 to 1024": 1 <= decoding.num_samples <= 1024,
        "num_beams must be 1 to 128": 1 <= decoding.num_beams <= 128,
        "num_beams above 1 needs do_sample false": not decoding.do_sample or decoding.num_beams == 1,
        "num_samples must be at most num_beams when do_sample is false": (
            decoding.do_sample or decoding.num_samples <= decoding.num_beams
        ),
        "temperature, top_k, top_p and min_p need do_sample; set it or leave them out": (
            decoding.do_sample or unfiltered
        ),
        "temperature must be above 0 and at most 100 (for 0 use greedy)": 0 < decoding.temperature <= 100,
        "top_k must be 0 (off) or more": decoding.top_k >= 0,
        "top_p must be above 0 and at most 1 (off)": 0 < decoding.top_p <= 1,
        "min_p must be 0 (off) or more, and below 1": 0 <= decoding.min_p < 1,
        f"max_new_tokens must be 1 to {MAX_NEW_TOKENS_LIMIT}": 1 <= decoding.max_new_tokens <= MAX_NEW_TOKENS_LIMIT,
        "min_new_tokens must be 0 or more, and below max_new_tokens": (
            0 <= decoding.min_new_tokens < decoding.max_new_tokens
        ),
        "generator must be 0 or more": decoding.generator is None or decoding.generator >= 0,
    }


def is_decoding_name(name: str) -> bool:
    """Whether a decoding of the built-in strategies or of the grammar has this name."""
    return _known_decoding(name) is not None


def decoding_of_name(name: str, num_samples: int) -> Decoding:
    """A decoding with the parameters that its name states, or with default ones if they do not fit or are unknown.

    Raises ConfigError if there are more than 1024 samples.
    """
    decoding = replace(_known_decoding(name) or Decoding(name=name), num_samples=num_samples, generator=None)
    if all(_rules(decoding).values()):
        return decoding
    return check_decodings([Decoding(name=name, num_samples=num_samples)], "sampling")[0]


def _known_decoding(name: str) -> Decoding | None:
    known = next((each for strategy in STRATEGIES.values() for each in strategy if each.name == name), None)
    if known is None:
        with contextlib.suppress(ConfigError):
            decoding = _parse_decoding(name)
            return decoding if decoding.name == name else None
    return known


_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "do_sample": (bool,),
    "temperature": (float, int),
    "top_p": (float, int),
    "min_p": (float, int),
}
"""Types of the parameters that are not integers."""
_MAX_BYTES = 1_000_000


def read_decodings(path: Path, length: int = MAX_NEW_TOKENS) -> tuple[Decoding, ...]:
    """Reads a file of decodings.

    `length` is the maximum number of new tokens for entries that do not set one. Raises ConfigError, which names the
    file, the entry, the parameter and the value, if an entry is not valid.
    """
    entries = _read_file(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: expected a list of decodings, got {quote(entries)}; see --strategy for their names")
    return check_decodings(
        [_parse_entry(path, number, entry, length) for number, entry in enumerate(entries, 1)], str(path)
    )


def _read_file(path: Path) -> object:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: too large for a file of decodings (maximum {_MAX_BYTES:,} bytes)")
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); --strategy names a file of decodings") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # A value that does not match its YAML tag raises various errors.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{path}:{line} neither YAML nor JSON ({quote(reason)}); fix the file") from error


def _parse_entry(path: Path, index: int, entry: object, length: int) -> Decoding:
    prefix = f"{path}: decoding {index}"
    if isinstance(entry, str):
        try:
            return replace(_parse_decoding(entry), max_new_tokens=length)
        except ConfigError as error:
            raise ConfigError(f"{prefix}: {error}") from error
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(f"{prefix}: expected a word such as topk40x4, or parameters with a name, got {quote(entry)}")
    names = [field.name for field in fields(Decoding)]
    for parameter, value in entry.items():
        if parameter not in names:
            raise ConfigError(f"{prefix}: {quote(parameter)} is an unknown parameter; choose one of {', '.join(names)}")
        types = _TYPES.get(parameter, (int,))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ConfigError(f"{prefix}: {parameter} must be {_type_names(types)}, got {quote(value)}")
    if not entry["name"].strip():
        raise ConfigError(f"{prefix}: name is empty; set one to identify its candidates")
    return Decoding(**{"max_new_tokens": length, **entry})


def _type_names(types: tuple[type, ...]) -> str:
    return {str: "a string", bool: "true or false", float: "a number", int: "an integer"}[types[0]]
