"""The key of a piece of work: step, version of the step, settings, inputs. Equal keys mean equal results.

One function computes both the name of a folder under the work folder and the fingerprint for an orchestrator's cache,
so both agree on which work is the same. The key contains the step's `version` (`cappy.steps`) instead of a hash of the
code, so that an edited comment does not invalidate finished work.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cappy.steps import step_version

KEY = "key.json"
"""Name of the key's file in the folder of a piece of work."""
MAX_VALUE_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Key:
    """Identifies a piece of work; `inputs` are hashes of what it reads, in an order that the step defines.

    `fresh` is the name of the run that asked to redo the work (`--fresh`), empty if none did. `finished` is whether the
    work was published. Neither is part of the digest.
    """

    step: str
    version: int
    settings: Mapping[str, object] = field(default_factory=dict)
    inputs: Sequence[object] = ()
    fresh: str = ""
    finished: bool = False

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of step, version, settings and inputs."""
        values = [self.step, self.version, dict(self.settings), list(self.inputs)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name of the work's folder: the first 24 digits of the digest."""
        return self.digest[:24]

    def to_json(self) -> str:
        """The text of key.json."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Key":
        """Parses the key that `to_json` wrote. Raises ValueError or TypeError if the text is not a key."""
        key = Key(**json.loads(text))
        if not isinstance(key.settings, dict) or not isinstance(key.inputs, list):
            raise TypeError("settings is not an object, or inputs is not a list")
        return key

    def differences(self, other: "Key") -> list[str]:
        """The differences from `other` to this key as texts, such as `temperature 0.9 -> 1.0`."""
        texts = [] if self.version == other.version else [f"version {other.version} -> {self.version}"]
        for name in sorted({*self.settings, *other.settings}):
            old, new = other.settings.get(name), self.settings.get(name)
            if old != new:
                texts.append(f"{name.replace('_', '-')} {_format_value(old)} -> {_format_value(new)}")
        if list(self.inputs) != list(other.inputs):
            texts.append("inputs")
        return texts


def work_key(step: str, settings: Mapping[str, object], inputs: Sequence[object] = (), *, fresh: str = "") -> Key:
    """The key of a piece of work with the current version of the step.

    `fresh` is the name of the run that asks to redo the work (`--fresh`), empty if it may be reused.
    """
    return Key(step=step, version=step_version(step), settings=dict(settings), inputs=list(inputs), fresh=fresh)


def _format_value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."
