"""A registered version, as the rest of the code sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cappy.evaluation.findings import OUT_OF_FOLD, ReportValues
from cappy.scoring.calibration import CALIBRATION, PROBE

CHAMPION = "champion"
CHALLENGER = "challenger"
MANIFEST_TAG = "cappy.manifest"
FORMER_TAG = "cappy.former"
RUN_TAG = "cappy.run"
TESTED_TAG = "cappy.tested_groups"
"""Sketch of the groups that the version was tested on; see `cappy.records.overlap`."""
ATTEMPT_TAG = "cappy.attempt"
EVIDENCE_TAG = "cappy.evidence"
EVALUATED = {CALIBRATION: "cappy.calibration", PROBE: "cappy.probe", OUT_OF_FOLD: "cappy.out_of_fold"}
"""Files that an evaluation wrote and that travel with the scorer; its manifest, which is older, does not name them.

Each has its sha256 in a tag of the version.
"""


def evidence_of(report: ReportValues) -> str:
    """What a report is about: the scorer itself, or its recipe where it was cross-fitted."""
    return "recipe" if report.get("folds") else "scorer"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model; `source` is where its files lie, `aliases` what points at it."""

    name: str
    number: int
    source: str
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """Its spec, which no alias can move."""
        return f"models:/{self.name}/{self.number}"

    @property
    def manifest_hash(self) -> str:
        """Hash of the scorer's manifest, and through it of every file; empty if another tool registered it."""
        return self.tags.get(MANIFEST_TAG, "")

    @property
    def content(self) -> str:
        """A name that changes with the scorer and with what its evaluation left beside it."""
        beside = (self.tags.get(tag, "")[:12] for tag in EVALUATED.values())
        return "-".join(filter(None, (self.manifest_hash, *beside)))

    @property
    def former(self) -> str:
        """Number of the version that was champion before this one; empty if there was none."""
        return self.tags.get(FORMER_TAG, "")

    @property
    def served_as(self) -> str:
        """The spec to serve it by: its alias, so that the service follows the gate; its number without one."""
        return f"models:/{self.name}@{self.alias}" if self.alias else self.uri

    @property
    def alias(self) -> str:
        """Champion or challenger, or empty."""
        return next((alias for alias in (CHAMPION, CHALLENGER) if alias in self.aliases), "")
