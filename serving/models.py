"""The scorer that is served: loaded, verified, probed, and changed for another one at a stroke."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cappy.errors import FolderError
from cappy.scoring import Precision
from cappy.scoring.calibration import Calibration, read_calibration
from cappy.scoring.encoding import Encoded, Pair
from serving.batcher import Computed, Engine
from serving.refusals import SHUTTING_DOWN

if TYPE_CHECKING:
    from cappy.registry.models import Version
    from cappy.scoring import Scorer

Stored = Sequence[tuple[Pair, float | None]]
"""Pairs with the score that they must have, or None where any finite number will do."""

PROBES: Stored = ((("What is 1 + 1?", "2"), None),)
"""For a scorer that nobody stored pairs with."""
TOLERANCE = 2e-2
"""How far a score may be from the stored one.

Stored pairs do not say in which precision they were scored. The built-in scorer's answers in bf16 were up to 7e-3 from
those in fp32 (256 pairs; 2 cores, Intel Xeon, 2026-11-26): less would refuse a sound version that was evaluated on
another machine. That the files are the registered ones, their sha256 says; this finds what computes them wrongly.
"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded scorer and what is said of it: `name` to ask for it by, `version` and `sha256` of its manifest."""

    engine: Engine
    name: str
    version: str
    sha256: str = ""
    spec: str = ""
    precision: str = "fp32"
    calibration: Calibration | None = None
    """What labels to expect of scores; None where the scorer has none."""
    probes: Stored = ()
    """What it answered when it was evaluated, where that came with it."""
    registered: "Version | None" = None
    """What the registry says of it, where an alias is followed."""

    @property
    def content(self) -> str:
        """What tells it from other versions in the registry; empty where no alias is followed."""
        return self.registered.content if self.registered else ""

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
    from cappy.scoring import Scorer
    from cappy.scoring.probe import read_probe
    from cappy.specs import open_scorer, parse_spec

    folder = open_scorer(spec)
    scorer = Scorer.load(str(folder.path), precision=precision)
    parsed = parse_spec(spec)
    return Model(
        engine=ScorerEngine(scorer),
        name=name or parsed.name.rstrip("/").rpartition("/")[2] or "cappy",
        version=scorer.version,
        sha256=folder.hash,
        spec=spec,
        precision=scorer.precision,
        calibration=read_calibration(folder.path),
        probes=[((instruction, response), score) for instruction, response, score in read_probe(folder.path)],
    )


def probe(model: Model, stored: Stored = PROBES) -> None:
    """Scores stored pairs, which also warms the model up; FolderError where an answer is not what it must be.

    One pair at a time: beside a model that answers, they need little memory and leave it its turns.
    """
    encoded = model.engine.encode([pair for pair, _ in stored])
    scores = [score for one in encoded for score, _ in model.engine.compute([one])]
    if len(scores) != len(stored) or not all(map(math.isfinite, scores)):
        raise FolderError(
            f"the scorer answers {scores} to stored pairs; its weights are damaged, fetch or train it again"
        )
    for score, (_, expected) in zip(scores, stored, strict=True):
        if expected is not None and abs(score - expected) > TOLERANCE:
            text = f"the scorer answers {score:.4f} to a stored pair that had {expected:.4f} when it was evaluated"
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
    """Version of the registry -> why it does not serve."""

    @property
    def unready(self) -> str:
        """Why new clients should look elsewhere; empty where they need not.

        A service that was told to end still answers, so this is more than `reason`.
        """
        return self.reason or (SHUTTING_DOWN if self.closing else "")

    def named(self, *names: str | None) -> Model | None:
        """The model of which each of these is name, version or spec, the current one first; an empty one is any."""
        loaded = [model for model in (self.current, self.former) if model is not None]
        known = [(model, {"", None, model.name, model.version, model.spec}) for model in loaded]
        return next((model for model, own in known if own.issuperset(names)), None)

    def swap(self, model: Model) -> None:
        """Lets a probed model answer from the next request on."""
        self.former, self.current = self.current, model

    def back(self) -> Model | None:
        """Changes the current model for the one before; None if there is none."""
        if self.former is None:
            return None
        self.current, self.former = self.former, self.current
        return self.current
