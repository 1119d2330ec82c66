"""The scorer that is served: loaded, verified, probed, and changed for another one at a stroke."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cappy.errors import FolderError
from cappy.scoring import Precision
from cappy.scoring.encoding import Encoded, Pair
from serving.batcher import Computed, Engine

if TYPE_CHECKING:
    from cappy.scoring import Scorer

PROBES: Sequence[tuple[Pair, float | None]] = ((("What is 1 + 1?", "2"), None),)
"""Pairs with the score that they must have, or None where any finite number will do."""
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3}
"""How far a score may be from the stored one (DESIGN section 6)."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded scorer and what is said of it: `name` to ask for it by, `version` and `sha256` of its manifest."""

    engine: Engine
    name: str
    version: str
    sha256: str = ""
    spec: str = ""
    precision: str = "fp32"
    calibrate: Callable[[Sequence[float]], list[float]] | None = None
    """Expected labels of scores, 0 to 1; None where the scorer has no calibration."""

    def facts(self) -> Mapping[str, str]:
        """What every answer carries."""
        return {"X-Cappy-Version": self.version, "X-Cappy-Manifest-Sha256": self.sha256}


class ScorerEngine:
    """A `Scorer` as the batcher needs it."""

    def __init__(self, scorer: "Scorer") -> None:
        self._scorer = scorer

    @property
    def pads(self) -> bool:
        """Whether this encoder's build is computed with padding."""
        return self._scorer.pads

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch that suit the device."""
        return self._scorer.batch_tokens

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """The pairs as token ids."""
        encoded: list[Encoded] = self._scorer.encoder.encode(pairs)
        return encoded

    def fit(self, pairs: Sequence[Pair]) -> bool:
        """Whether no pair has to be cut."""
        return all(self._scorer.encoder.fit(pairs))

    def compute(self, batch: Sequence[Encoded]) -> Computed:
        """One pass of the model."""
        logits = self._scorer.forward(batch)
        return list(zip(self._scorer.decode(logits), logits.tolist(), strict=True))


def load(spec: str, name: str = "", precision: Precision = "auto") -> Model:
    """The scorer that a spec names, every file's sha256 checked; ConfigError or FolderError with the remedy."""
    from cappy.records.folder import MANIFEST, read_manifest
    from cappy.scoring import Scorer
    from cappy.scoring.calibration import read_calibration
    from cappy.specs import parse_spec, scorer_folder

    folder = scorer_folder(spec)
    scorer = Scorer.load(str(folder), precision=precision)
    calibration = read_calibration(folder)
    parsed = parse_spec(spec)
    return Model(
        engine=ScorerEngine(scorer),
        name=name or parsed.name.rstrip("/").rpartition("/")[2] or "cappy",
        version=scorer.version,
        sha256=read_manifest(folder).hash if (folder / MANIFEST).exists() else "",
        spec=spec,
        precision=scorer.precision,
        calibrate=calibration.apply if calibration else None,
    )


def probe(model: Model, stored: Sequence[tuple[Pair, float | None]] = PROBES) -> None:
    """Scores stored pairs, which also warms the model up; FolderError where an answer is not what it must be."""
    answers = model.engine.compute(model.engine.encode([pair for pair, _ in stored]))
    scores = [score for score, _ in answers]
    if len(scores) != len(stored) or not all(map(math.isfinite, scores)):
        raise FolderError(
            f"the scorer answers {scores} to stored pairs; its weights are damaged, fetch or train it again"
        )
    tolerance = TOLERANCES.get(model.precision, TOLERANCES["bf16"])
    for score, (_, expected) in zip(scores, stored, strict=True):
        if expected is not None and abs(score - expected) > tolerance:
            text = f"the scorer answers {score:.4f} to a stored pair that had {expected:.4f} when it was registered"
            raise FolderError(f"{text}; serve it with the versions that evaluated it, or evaluate it again")


@dataclass
class Models:
    """The model that answers now and the one before it, which `back` puts in its place again."""

    current: Model
    former: Model | None = None
    reason: str = "the probe is running; ask again"
    """Why there are no scores to be had; empty once the current model has answered its probe."""
    closing: bool = False
    """Whether the service has been told to end."""
    refused: dict[str, str] = field(default_factory=dict)
    """Version -> why it does not serve."""

    def swap(self, model: Model) -> None:
        """Lets a probed model answer from the next request on."""
        self.former, self.current = self.current, model

    def back(self) -> Model | None:
        """Changes the current model for the one before; None if there is none."""
        if self.former is None:
            return None
        self.current, self.former = self.former, self.current
        return self.current
