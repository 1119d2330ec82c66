"""Promotion: the gate. The champion's alias moves only to a scorer that is proven better."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cappy.config import DEFAULT_WORK, Location, Work, code_version, identity, settings
from cappy.errors import FolderError
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_bytes
from cappy.registry.models import CHAMPION, Version
from cappy.registry.registration import TrackingUri

BASELINES = {"random": "random choice", "likelihood": "the better likelihood selector"}


@settings
class PromotionConfig:
    """A registered version, and the report on it and on the present champion."""

    version: Annotated[Location, Field(description="Folder of the registration")]
    report: Annotated[Location, Field(description="Folder of the evaluation")]
    target: Annotated[Location, Field(description="Folder to write decision.json to")]
    margin: Annotated[
        float, Field(ge=0, le=1, description="What the lower bound of the gain must be above, on the scale of 0 to 1")
    ] = 0.0
    tracking_uri: TrackingUri = ""
    work: Work = DEFAULT_WORK


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gate says, and why, in sentences."""

    decision: Literal["promote", "hold"]
    reasons: tuple[str, ...]


def decide(report: Mapping[str, Any], *, has_champion: bool, margin: float = 0.0) -> Decision:
    """The gate's rule on a report's `comparisons` (paired differences with 95% intervals, 0..1) and `leaks`.

    With a champion the lower bound of the difference to it must be above `margin`; the first version must beat random
    choice and, where there is one, the better likelihood selector. A scorer trained on a reported prompt is held.
    """
    comparisons = report.get("comparisons", {})
    checks = [_leak(name, count) for name, count in report.get("leaks", {}).items() if count]
    if has_champion:
        checks.append(_check(comparisons, "champion", "the champion", margin))
    else:
        checks.append(_check(comparisons, "random", BASELINES["random"], margin))
        if "scorer-likelihood" in comparisons:
            checks.append(_check(comparisons, "likelihood", BASELINES["likelihood"], margin))
    reasons = [sentence for _, sentence in checks]
    if not has_champion and "scorer-mbr" in comparisons:
        reasons.append(f"For information: against MBR the difference is {_interval(comparisons['scorer-mbr'])}.")
    passed = all(passed for passed, _ in checks)
    return Decision(decision="promote" if passed else "hold", reasons=tuple(reasons))


def run(config: PromotionConfig, progress: Progress = silent) -> Manifest:
    """Decides, moves the aliases if the decision is to promote, and writes decision.json; hold is a result."""
    from cappy.records.work import claim, finish

    registered = read_version(config.version)
    report = _read(config.report, "report.json")
    parents = (read_manifest(config.version).hash, read_manifest(config.report).hash)
    with claim(config.work, "promotion", identity(config), parents) as folder:
        decision, version = _decided(config, registered, report)
        values = {
            "decision": decision.decision,
            "reasons": list(decision.reasons),
            "name": version.name,
            "version": version.number,
            "uri": version.uri,
            "serve": f"cappy serve --scorer {version.served_as}",
        }
        write_bytes(folder / "decision.json", json.dumps(values, indent=1, ensure_ascii=False).encode())
        manifest = Manifest(
            step="promotion",
            files=describe_files(folder),
            config=identity(config),
            code=code_version(),
            parents=parents,
            facts=values,
        )
        progress(1, 1, unit="decisions")
        return finish(folder, config.target, manifest)


def read_version(folder: Path) -> str:
    """The spec (models:/name/number) that a registration wrote; FolderError if the folder is none."""
    return str(_read(folder, "version.json")["uri"])


def _decided(config: PromotionConfig, registered: str, report: Mapping[str, Any]) -> tuple[Decision, Version]:
    """The decision, carried out, and the version as it is afterwards."""
    from cappy.registry import versions
    from cappy.registry.client import connected

    version = versions.resolve(registered, tracking_uri=config.tracking_uri)
    with connected(config.tracking_uri) as client:
        champion = versions.find(client, version.name, CHAMPION)
        decision = _with_champion(report, version, champion, config.margin)
        if decision.decision == "promote":
            versions.promote(client, version)
        return decision, versions.find(client, version.name, str(version.number)) or version


def _with_champion(report: Mapping[str, Any], version: Version, champion: Version | None, margin: float) -> Decision:
    if champion is not None and champion.number == version.number:
        return Decision(decision="promote", reasons=(f"Version {version.number} is already champion.",))
    told = report.get("versions", {}).get("champion", "")
    if champion is not None and not (told and champion.manifest_hash.startswith(told)):
        compared = f"the report compares with {told}" if told else "the report compares with no champion"
        moved = f"The champion is now version {champion.number} ({champion.manifest_hash[:12]}), but {compared}"
        return Decision(decision="hold", reasons=(f"{moved}: run the pipeline again to compare with it.",))
    return decide(report, has_champion=champion is not None, margin=margin)


def _check(comparisons: Mapping[str, Any], other: str, words: str, margin: float) -> tuple[bool, str]:
    found = comparisons.get(f"scorer-{other}")
    if found is None:
        return False, f"The report has no comparison with {words}: evaluate again."
    passed = found["low"] > margin
    verb = "beats" if passed else "is not proven to beat"
    bar = f" by more than {100 * margin:.1f}" if margin else ""
    return passed, f"The scorer {verb} {words}{bar}: difference {_interval(found)}."


def _leak(name: str, count: int) -> tuple[bool, str]:
    return False, f"The {name} was trained on {count} of the reported prompts: prepare splits that share none."


def _interval(found: Mapping[str, float]) -> str:
    difference, low, high = (f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{difference} (95% interval {low} to {high}, x100)"


def _read(folder: Path, name: str) -> dict[str, Any]:
    read_manifest(folder)
    path = folder / name
    if not path.is_file():
        raise FolderError(f"{path}: is missing; give the folder that the step before wrote")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
