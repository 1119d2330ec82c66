"""What the model behind an endpoint takes, learned from what it refuses.

A list of models would be out of date before it is read; a refusal costs nothing and is asked for once. What changes no
distribution (`n`, `seed`, `logprobs`) is left out once it is refused. A parameter that does (`KNOBS`) is left out only
where its value changes nothing, such as top_p 1: greedy decoding without its temperature 0 would be sampling. Of knobs
that are refused together the neutral ones go; one that is refused by name and needed is asked for once more without the
others, since some servers name only one of two that they do not take together.
"""

import re
import threading
from collections.abc import Mapping
from typing import Any

KNOBS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0, "min_tokens": 0}
"""Parameters that change what is drawn, and the value of each that changes nothing."""
OPTIONAL = (
    *("n", "temperature", "top_p", "seed", "logprobs", "max_tokens", "max_completion_tokens"),
    *("top_k", "min_p", "min_tokens"),
)
"""What a request can do without."""
LENGTH = "max_tokens"
NEW_LENGTH = "max_completion_tokens"
_UNKNOWN = re.compile(
    r"unsupported|not support|n't support|unknown|unexpected|unrecogni[sz]ed|not (?:permitted|allowed)|extra|deprecated"
    rf"|{NEW_LENGTH}",
    re.IGNORECASE,
)


_OTHER_NAMES = {
    "logprobs": r"\blog[ _-]?prob",
    **{name: rf"\b{name.replace('_', '-?')}\b" for name in KNOBS if "_" in name},
}
"""How else servers name a parameter: topP, top-p, log probabilities."""


class NeededParameterError(Exception):
    """The model refuses parameters that a decoding cannot do without; `words` are the server's."""

    def __init__(self, values: Mapping[str, float], words: str) -> None:
        self.values = " with ".join(f"{name} {value:g}" for name, value in values.items())
        self.words = words
        super().__init__(self.values)


class Capabilities:
    """Which parameters are still asked for; several threads may learn at once."""

    def __init__(self) -> None:
        self._off: set[str] = set()
        self._refused_knobs: dict[frozenset[str], str] = {}
        self._refused_alone: set[str] = set()
        self._lock = threading.Lock()

    def takes(self, parameter: str) -> bool:
        """Whether it has not been refused."""
        return parameter not in self._off and frozenset([parameter]) not in self._refused_knobs

    def refuse(self, *parameters: str, words: str = "", sent: Mapping[str, Any] | None = None) -> None:
        """Asks for it no more in this run; several knobs are refused together, and each alone may still be taken.

        `sent` is the body that was refused.
        """
        with self._lock:
            if all(name in KNOBS for name in parameters):
                if len(parameters) == 1 and not [
                    name for name in KNOBS if name in (sent or {}) and name not in parameters
                ]:
                    self._refused_alone.update(parameters)
                self._refused_knobs = {**self._refused_knobs, frozenset(parameters): words}
            else:
                self._off.update(parameters)

    def trimmed(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The body without what is refused, and the names of what is left out.

        The limit on length goes by its newer name where the older is refused, and then nothing is left out.
        NeededParameterError where what is refused decides what is drawn.
        """
        kept = dict(body)
        if LENGTH in kept and not self.takes(LENGTH):
            kept[NEW_LENGTH] = kept.pop(LENGTH)
        dropped = {name for name in kept if name in self._off} | self._dropped_knobs(kept)
        left_out = tuple(sorted(LENGTH if name == NEW_LENGTH else name for name in dropped))
        return {name: value for name, value in kept.items() if name not in dropped}, left_out

    def _dropped_knobs(self, body: Mapping[str, Any]) -> set[str]:
        dropped: set[str] = set()
        # Those that are refused alone first: a pair of which one is gone is no pair any more.
        for together, words in sorted(self._refused_knobs.items(), key=lambda rule: (len(rule[0]), sorted(rule[0]))):
            named = [name for name in KNOBS if name in together and name in body and name not in dropped]
            if len(named) < len(together):
                continue
            needed = [name for name in named if body[name] != KNOBS[name]]
            others = {name for name in KNOBS if name in body and name not in together and body[name] == KNOBS[name]}
            if needed and len(together) == 1 and others and not self._refused_alone.issuperset(together):
                dropped.update(others)
                continue
            if len(needed) > (len(together) > 1):
                raise NeededParameterError({name: body[name] for name in needed}, words)
            stays = needed or named[:1] if len(together) > 1 else []
            dropped.update(name for name in named if name not in stays)
        return dropped


def refused_parameters(sent: Mapping[str, Any], message: str, parameter: str | None) -> tuple[str, ...]:
    """The parameters that a refusal is about: one, or all knobs that it names; none if it names none that was sent."""
    found = refused_parameter(sent, message, parameter)
    if found not in KNOBS:
        return (found,) if found else ()
    return tuple(name for name in KNOBS if name in sent and (name == found or _names(message, name)))


def refused_parameter(sent: Mapping[str, Any], message: str, parameter: str | None) -> str | None:
    """The parameter that a refusal names, by its field or else in its text; None if it names none that was sent.

    A limit on length that is merely too high is no refusal of the parameter: without it responses would cost more.
    """
    optional = [name for name in OPTIONAL if name in sent]
    named = parameter.split(".")[0] if parameter else None
    found = named if named in optional else next((name for name in optional if _names(message, name)), None)
    if found in (LENGTH, NEW_LENGTH) and not _UNKNOWN.search(message):
        return None
    return found


def _names(message: str, name: str) -> bool:
    quoted = rf"['\"`]{name}['\"`]"
    # A lone letter is a parameter only in quotes or where something is said of its value.
    pattern = rf"{quoted}|\bn\s*(?:[=>!]|must|is|should|>)" if name == "n" else rf"\b{name}\b"
    other = _OTHER_NAMES.get(name)
    return bool(re.search(pattern, message) or (other and re.search(other, message, re.IGNORECASE)))
