"""The key of a piece of work: step, version of the step, settings, inputs. Equal keys mean equal results.

One function makes the key of a folder under the work folder and the fingerprint that an orchestrator's cache sees, so
both agree on what is the same work. The code is not in it: a step's `version` (`cappy.steps`) stands for what it
computes, as orchestrators that cache do it, so that a changed comment leaves finished work where it is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cappy.steps import step_version

KEY = "key.json"
"""The key's file, in the folder of the work."""
LONGEST_VALUE = 60


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a piece of work is; `inputs` are hashes of what it reads, in the step's own order.

    `fresh` names the run that asked for the work to be done again, `finished` says that it was published; neither is
    compared.
    """

    step: str
    version: int
    settings: Mapping[str, object] = field(default_factory=dict)
    inputs: Sequence[object] = ()
    fresh: str = ""
    finished: bool = False

    @property
    def digest(self) -> str:
        """sha256 in hexadecimal over step, version, settings and inputs."""
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
        """The key that `to_json` wrote; ValueError or TypeError if it is not one."""
        key = Key(**json.loads(text))
        if not isinstance(key.settings, dict) or not isinstance(key.inputs, list):
            raise TypeError("settings is not an object, or inputs is not a list")
        return key

    def differences(self, other: "Key") -> list[str]:
        """What this key has that `other` has not, for a person: `temperature 0.9 -> 1.0`, other's value first."""
        texts = [] if self.version == other.version else [f"version {other.version} -> {self.version}"]
        for name in sorted({*self.settings, *other.settings}):
            before, now = other.settings.get(name), self.settings.get(name)
            if before != now:
                texts.append(f"{name.replace('_', '-')} {_short(before)} -> {_short(now)}")
        if list(self.inputs) != list(other.inputs):
            texts.append("inputs")
        return texts


def work_key(step: str, settings: Mapping[str, object], inputs: Sequence[object] = (), *, fresh: str = "") -> Key:
    """The key of a piece of work under the step's present version."""
    return Key(step=step, version=step_version(step), settings=dict(settings), inputs=list(inputs), fresh=fresh)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
