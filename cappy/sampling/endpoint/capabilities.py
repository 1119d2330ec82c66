"""What the model behind an endpoint takes, learned from what it refuses.

A list of models would be out of date before it is read; a refusal costs nothing and is asked for once.
"""

import re
import threading
from collections.abc import Mapping
from typing import Any

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


class Capabilities:
    """Which parameters are still asked for; several threads may learn at once."""

    def __init__(self) -> None:
        self._off: set[str] = set()
        self._lock = threading.Lock()

    def takes(self, parameter: str) -> bool:
        """Whether it has not been refused."""
        return parameter not in self._off

    def refuse(self, parameter: str) -> None:
        """Asks for it no more in this run."""
        with self._lock:
            self._off.add(parameter)

    def trimmed(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The body without what is refused, and the names of what is left out.

        The limit on length goes by its newer name where the older is refused, and then nothing is left out.
        """
        kept = dict(body)
        if LENGTH in kept and not self.takes(LENGTH):
            kept[NEW_LENGTH] = kept.pop(LENGTH)
        left_out = tuple(sorted(LENGTH if name == NEW_LENGTH else name for name in kept if not self.takes(name)))
        return {name: value for name, value in kept.items() if self.takes(name)}, left_out


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
    return re.search(pattern, message) is not None
