"""The promotion step: moves the champion alias to a version only if the gate finds it proven better."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cappy.config import DEFAULT_WORK, Fresh, Location, Work, build, result_settings, settings
from cappy.errors import FolderError, RecordError, quote
from cappy.evaluation import read_values
from cappy.evaluation.findings import ReportValues
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_bytes
from cappy.records.work import claim, finish
from cappy.registry.gate import Baseline, Decision, decide, parse_guards
from cappy.registry.models import CHAMPION, Version, report_subject
from cappy.registry.registration import TrackingUri
from cappy.steps import step_version


@settings
class PromotionConfig:
    """A registered version, its report, and the rules of the gate."""

    version: Annotated[Location, Field(description="Folder of the registration")]
    report: Annotated[Location, Field(description="Folder of the evaluation")]
    target: Annotated[Location, Field(description="Folder to write decision.json to")]
    margin: Annotated[
        float, Field(ge=0, le=1, description="Minimum gain, 0 to 1: the lower bound of the gain must be above it")
    ] = 0.0
    baseline: Annotated[
        Baseline,
        Field(
            description="Selectors that the first registered version must beat, in addition to random choice: "
            "likelihood; or mbr for both likelihood and MBR"
        ),
    ] = "likelihood"
    guard: Annotated[
        tuple[str, ...], Field(description="TASK=MARGIN: this task must not fall by more than the margin, 0 to 1")
    ] = ()
    count_attempts: Annotated[
        bool, Field(description="Require more confidence for each further version tested on the same groups")
    ] = True
    force: Annotated[
        bool, Field(description="Promote a version that was rolled back, if it passes the other checks")
    ] = False
    tracking_uri: TrackingUri = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        parse_guards(self.guard)


def run(config: PromotionConfig, progress: Progress = silent) -> Manifest:
    """Decides, moves the aliases if the decision is promote, and writes decision.json; a hold is not an error."""
    spec, report = read_version_uri(config.version), read_values(config.report, check_hashes=True)
    parents = (read_manifest(config.version).hash, read_manifest(config.report).hash)
    with claim(config.work, "promotion", result_settings(config), parents, fresh=config.fresh) as folder:
        decision, version, attempt = _decide(config, spec, report)
        values = {
            "decision": decision.decision,
            "reasons": list(decision.reasons),
            "name": version.name,
            "version": version.number,
            "uri": version.uri,
            "serve": f"cappy serve --scorer {version.serving_spec}",
        }
        record = {**values, "attempt": attempt, "evidence": report_subject(report), "basis": basis(config, report)}
        write_bytes(folder / "decision.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
        manifest = Manifest(
            step="promotion",
            files=describe_files(folder),
            config=result_settings(config),
            step_version=step_version("promotion"),
            parents=parents,
            facts=values,
        )
        progress(1, 1, unit="decisions")
        return finish(folder, config.target, manifest)


def basis(config: PromotionConfig, report: ReportValues) -> dict[str, object]:
    """The basis of the decision: settings of the gate, comparisons of the selector, leaks and versions."""
    comparisons = report.get("comparisons", {})
    return {
        "margin": config.margin,
        "baseline": config.baseline,
        "guards": parse_guards(config.guard),
        "comparisons": {key: value for key, value in comparisons.items() if key.startswith("selector-")},
        "leaks": report.get("leaks", {}),
        "force": config.force,
        "versions": report.get("versions", {}),
    }


def read_version_uri(folder: Path) -> str:
    """The spec (models:/name/number) that a registration wrote. Raises FolderError for any other folder."""
    uri = _read_object(folder, "version.json").get("uri")
    if not isinstance(uri, str):
        raise FolderError(f"{folder / 'version.json'}: has no version (uri); give the folder of a registration")
    return uri


def dry_run(version: Path, report: Path, **settings: object) -> Decision:
    """The decision that the gate would make now; nothing is moved or written."""
    # A config needs a target, but nothing is written to it.
    config = build(PromotionConfig, {**settings, "version": version, "report": report, "target": "nowhere"})
    decision, _, _ = _decide(config, read_version_uri(version), read_values(report, check_hashes=True), apply=False)
    return decision


def _decide(
    config: PromotionConfig, spec: str, report: ReportValues, *, apply: bool = True
) -> tuple[Decision, Version, int]:
    """Decides and moves the aliases; returns the decision, the updated version, and the attempt (0 if not counted)."""
    from cappy.registry import aliases, versions
    from cappy.registry.client import connect

    guards = parse_guards(config.guard)
    version = versions.resolve(spec, tracking_uri=config.tracking_uri)
    with connect(config.tracking_uri) as client:
        # With the lock, the second of two concurrent promotions sees the new champion and holds, because its report
        # does not compare with it.
        with aliases.lock_alias(client, version.name) if apply else contextlib.nullcontext():
            champion = versions.find(client, version.name, CHAMPION)
            attempt = versions.count_attempt(client, version, _tested_groups(report)) if config.count_attempts else 0
            decision = _decide_given_champion(report, version, champion, config, guards, attempt)
            is_champion = champion is not None and champion.number == version.number
            if decision.decision == "promote" and not config.force and not is_champion:
                decision = _hold_rolled_back(aliases.was_rolled_back(client, version), version) or decision
            if apply:
                versions.record_attempt(client, version, _tested_groups(report), attempt)
                if decision.decision == "promote":
                    aliases.promote(client, version, decision.reasons[0])
        return decision, versions.find(client, version.name, str(version.number)) or version, attempt


def _tested_groups(report: ReportValues) -> str:
    digest = report.get("tested_groups")
    if not isinstance(digest, str) or not digest:
        raise RecordError("report: the tested groups are missing (tested_groups); evaluate again")
    return digest


def _hold_rolled_back(was_rolled_back: bool, version: Version) -> Decision | None:
    """The decision hold for a version that was rolled back; None for any other version."""
    if not was_rolled_back:
        return None
    reason = f"Version {version.number} was rolled back: promote it with --force, or train a new one."
    return Decision(decision="hold", reasons=(reason,))


def _decide_given_champion(
    report: ReportValues,
    version: Version,
    champion: Version | None,
    config: PromotionConfig,
    guards: Mapping[str, float],
    attempt: int,
) -> Decision:
    if champion is not None and champion.number == version.number:
        return Decision(decision="promote", reasons=(f"Version {version.number} is already champion.",))
    challenger_hash = report.get("versions", {}).get("challenger", "")
    if not (challenger_hash and version.manifest_hash.startswith(challenger_hash)):
        subject = challenger_hash or "a scorer that it does not name"
        reason = (
            f"The report is on {subject}, not on version {version.number} ({version.manifest_hash[:12]}): evaluate it."
        )
        return Decision(decision="hold", reasons=(reason,))
    selector_hashes = report.get("selector_hashes", {})
    if selector_hashes.get("challenger", "") != version.selector_hash:
        reason = f"The report is on another selector than that of version {version.number}: register this report."
        return Decision(decision="hold", reasons=(reason,))
    champion_hash = report.get("versions", {}).get("champion", "")
    same_scorer = champion is None or (champion_hash and champion.manifest_hash.startswith(champion_hash))
    if champion is not None and same_scorer and selector_hashes.get("champion", "") != champion.selector_hash:
        problem = f"The report compares with another selector than that of the champion, version {champion.number}"
        remedy = f"evaluate with --champion models:/{champion.name}@champion, or run the pipeline again"
        return Decision(decision="hold", reasons=(f"{problem}: {remedy}.",))
    if champion is not None and not same_scorer:
        compared = f"the report compares with {champion_hash or 'no champion'}"
        problem = f"The champion is now version {champion.number} ({champion.manifest_hash[:12]}), but {compared}"
        remedy = f"evaluate with --champion models:/{champion.name}@champion, or run the pipeline again"
        return Decision(decision="hold", reasons=(f"{problem}: {remedy}.",))
    return decide(
        report,
        has_champion=champion is not None,
        margin=config.margin,
        baseline=config.baseline,
        guards=guards,
        attempt=attempt,
    )


def _read_object(folder: Path, name: str) -> dict[str, object]:
    read_manifest(folder)
    path = folder / name
    if not path.is_file():
        raise FolderError(f"{path}: is missing; give the folder that the previous step wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: is not JSON ({quote(str(error), 80)}); run the previous step again") from error
    if not isinstance(values, dict):
        raise FolderError(f"{path}: must be a JSON object, got {quote(values)}; run the previous step again")
    return values
