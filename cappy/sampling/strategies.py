"""Decoding strategies: by name, by a small grammar, or from a file.

A strategy is decodings joined by `+`, e.g. `beam4+topk40x4`:

greedy                  the most probable token at every step
beamN, beamNxM          the best of N beams; the M best of them
samplingN               N samples at temperature 1, nothing cut away
temperatureT, topkK,    one sample with that knob; `xN` at the end draws N, `-` joins knobs: `temperature0.7-topp0.9x4`
toppP, minpP

A file of decodings is a list in YAML or JSON, each a word of the grammar or the knobs by name:

- greedy
- topk40x4
- {name: warm, num_samples: 4, temperature: 1.3, min_p: 0.05, max_new_tokens: 128}

Each decoding states every knob, so that nothing of a model's own configuration leaks in.
"""

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
"""Chat models answer in paragraphs: at 64 tokens nearly every response would be cut."""
MAX_NEW_TOKENS_LIMIT = 32768
FILES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How one generator draws `num_samples` responses for an instruction.

    `top_k` 0, `top_p` 1 and `min_p` 0 switch their filters off; with `do_sample` false the responses are the best of
    `num_beams` beams (greedy for one beam). The end token is not drawn before `min_new_tokens` others. `generator`
    is the position, from 0, of the only generator that draws it; None: all do.
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
    """The 17 candidates as they were really published (method, section 4), to compare with: not honest baselines.

    The library of the reference code left top-k 50 on wherever a call named no other, so that `sampling` was top-k 50,
    `temperature0.9` and `topp0.95` too. The lengths are those of its calls as well: they count the start token, so at
    most 63 new tokens, and no end token among the first three.
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
    """A reconstruction, not a published setting: 5 samples of each of two generators (method, section 1.4).

    The numbers of samples and which filter belongs to which generator (top-k to the first, BART0; top-p to the second,
    T0-3B) are recalled, the values 40 and 0.95 are those of the finetuning code. Only templates without choices were
    sampled from, as the step does anyway.
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
"""`paper17` is the 17-candidate scheme of Cappy (reference code, generation script) with its top-k 50 leak mended."""

GRAMMAR = (
    "greedy, beamN, samplingN, temperatureTxN, topkKxN, toppPxN or minpPxN, joined by +, as in beam4+topk40x4; or a "
    f"file of decodings ({', '.join(FILES)})"
)
_NUMBER = "[0-9]{1,9}"
_FRACTION = rf"{_NUMBER}(?:\.[0-9]{{1,9}})?"
_KNOB = rf"(?:topk{_NUMBER}|(?:temperature|topp|minp){_FRACTION})"
_BEAM = re.compile(rf"beam({_NUMBER})(?:x({_NUMBER}))?")
_SAMPLING = re.compile(rf"sampling({_NUMBER})")
_KNOBS = re.compile(rf"({_KNOB}(?:-{_KNOB})*)(?:x({_NUMBER}))?")


def default_strategy(kind: str) -> str:
    """The strategy of a generator of this kind (as in `cappy.specs`) where none is named: one that it can do."""
    return "endpoint8" if kind in ("openai", "vllm") else "paper17"


def default_length(kind: str) -> int:
    """Longest response, in tokens, of a generator of this kind where nothing states one."""
    return ENDPOINT_NEW_TOKENS if kind == "openai" else MAX_NEW_TOKENS


def parse_strategy(text: str, length: int = MAX_NEW_TOKENS) -> tuple[Decoding, ...]:
    """The decodings that a strategy's name, expression or file means; ConfigError lists the names and the grammar.

    `length` is the longest response in tokens of those that state none.
    """
    if text.endswith(FILES):
        return read_decodings(Path(text), length)
    # What comes with the project states no length of 64, but for want of another.
    return tuple(
        replace(one, max_new_tokens=length) if one.max_new_tokens == MAX_NEW_TOKENS else one
        for one in _parse_expression(text)
    )


def _parse_expression(text: str) -> tuple[Decoding, ...]:
    if text in STRATEGIES:
        return STRATEGIES[text]
    decodings = tuple(one for word in text.split("+") for one in STRATEGIES.get(word) or (_parse_decoding(word, text),))
    return check_decodings(decodings, f"sampling: --strategy {quote(text)}")


def decodings_of(decodings: Sequence[Decoding], position: int) -> tuple[Decoding, ...]:
    """Those of the decodings that the generator at this position, from 0, draws by."""
    return tuple(decoding for decoding in decodings if decoding.generator in (None, position))


def _parse_decoding(word: str, text: str = "") -> Decoding:
    """The decoding that one word of the grammar means; `text` is the whole strategy, for the error."""
    if word == "greedy":
        return GREEDY
    if match := _BEAM.fullmatch(word):
        return Decoding(
            name=f"beam{match[1]}", do_sample=False, num_beams=int(match[1]), num_samples=int(match[2] or 1)
        )
    if match := _SAMPLING.fullmatch(word):
        return Decoding(name="sampling", num_samples=int(match[1]))
    match = _KNOBS.fullmatch(word)
    knobs = dict(re.findall(r"([a-z]+)([0-9.]+)", match[1])) if match else {}
    if match and len(knobs) == match[1].count("-") + 1:
        return Decoding(
            name=match[1],
            num_samples=int(match[2] or 1),
            temperature=float(knobs.get("temperature", 1)),
            top_k=int(knobs.get("topk", 0)),
            top_p=float(knobs.get("topp", 1)),
            min_p=float(knobs.get("minp", 0)),
        )
    within = f" in {quote(text)}" if text and text != word else ""
    raise ConfigError(
        f"sampling: --strategy: {quote(word)}{within} is unknown; choose one of {', '.join(STRATEGIES)}, or {GRAMMAR}"
    )


def check_decodings(decodings: Sequence[Decoding], where: str) -> tuple[Decoding, ...]:
    """The same decodings once every knob is in its range and no two have a name; ConfigError says which is not."""
    for decoding in decodings:
        wrong = next((rule for rule, held in _rules(decoding).items() if not held), None)
        if wrong:
            raise ConfigError(f"{where}: decoding {quote(decoding.name)}: {wrong}")
    named = Counter((decoding.name, decoding.generator) for decoding in decodings)
    drawn_by_all = {name for name, generator in named if generator is None}
    twice = next(
        (
            name
            for (name, generator), count in named.items()
            if count > 1 or (generator is not None and name in drawn_by_all)
        ),
        None,
    )
    if twice is not None:
        raise ConfigError(f"{where}: {quote(twice)} stands twice; draw its samples in one decoding")
    return tuple(decodings)


def _rules(decoding: Decoding) -> dict[str, bool]:
    plain = (decoding.temperature, decoding.top_k, decoding.top_p, decoding.min_p) == (1.0, 0, 1.0, 0.0)
    return {
        "num_samples must be 1 to 1024": 1 <= decoding.num_samples <= 1024,
        "num_beams must be 1 to 128": 1 <= decoding.num_beams <= 128,
        "num_beams asks for beams, so do_sample must be false": not decoding.do_sample or decoding.num_beams == 1,
        "num_samples must not be more than num_beams, since nothing is drawn": (
            decoding.do_sample or decoding.num_samples <= decoding.num_beams
        ),
        "temperature, top_k, top_p and min_p act on samples; set do_sample or leave them out": (
            decoding.do_sample or plain
        ),
        "temperature must be above 0 and at most 100 (greedy is its limit at 0)": 0 < decoding.temperature <= 100,
        "top_k must be 0 (off) or more": decoding.top_k >= 0,
        "top_p must be above 0 and at most 1 (off)": 0 < decoding.top_p <= 1,
        "min_p must be 0 (off) or more, and below 1": 0 <= decoding.min_p < 1,
        f"max_new_tokens must be 1 to {MAX_NEW_TOKENS_LIMIT}": 1 <= decoding.max_new_tokens <= MAX_NEW_TOKENS_LIMIT,
        "min_new_tokens must be 0 or more, and below max_new_tokens": (
            0 <= decoding.min_new_tokens < decoding.max_new_tokens
        ),
        "generator must be a position from 0": decoding.generator is None or decoding.generator >= 0,
    }


_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "do_sample": (bool,),
    "temperature": (float, int),
    "top_p": (float, int),
    "min_p": (float, int),
}
"""Types of the knobs that are not whole numbers."""
_MAX_BYTES = 1_000_000


def read_decodings(path: Path, length: int = MAX_NEW_TOKENS) -> tuple[Decoding, ...]:
    """The decodings of a file; ConfigError names the file, the entry, the knob and the value.

    `length` is the longest response in tokens of entries that state none.
    """
    entries = _read_file(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: must be a list of decodings, got {quote(entries)}; see --strategy for their names")
    return check_decodings(
        [_parse_entry(path, number, entry, length) for number, entry in enumerate(entries, 1)], str(path)
    )


def _read_file(path: Path) -> object:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {_MAX_BYTES} bytes, so it is not a file of decodings")
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); --strategy names a file of decodings") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # A value that is not what its tag says raises whatever its reader trips over.
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        reason = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{path}:{line} is neither YAML nor JSON ({quote(reason)}); mend it") from error


def _parse_entry(path: Path, number: int, entry: object, length: int) -> Decoding:
    where = f"{path}: decoding {number}"
    if isinstance(entry, str):
        try:
            return replace(_parse_decoding(entry), max_new_tokens=length)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if not isinstance(entry, dict) or "name" not in entry:
        raise ConfigError(f"{where}: must be a word as topk40x4 or knobs with a name, got {quote(entry)}")
    known = [field.name for field in fields(Decoding)]
    for knob, value in entry.items():
        if knob not in known:
            raise ConfigError(f"{where}: {quote(knob)} is not a knob; choose from {', '.join(known)}")
        wanted = _TYPES.get(knob, (int,))
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise ConfigError(f"{where}: {knob} must be {_type_names(wanted)}, got {quote(value)}")
    if not entry["name"].strip():
        raise ConfigError(f"{where}: name is empty; it tells candidates apart")
    return Decoding(**{"max_new_tokens": length, **entry})


def _type_names(wanted: tuple[type, ...]) -> str:
    return {str: "a text", bool: "true or false", float: "a number", int: "a whole number"}[wanted[0]]
