"""Summaries of a finished run: the table, the version, the gate's decision, the next command."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from cappy.evaluation import read_report
from cappy.records import Manifest, read_manifest
from cappy.records.folder import MANIFEST
from cappy.redaction import has_secret
from cappy.steps import TRAINING_STEPS

if TYPE_CHECKING:
    from pipelines.local import RunOutcome


class Facts(TypedDict, total=False):
    """The result of a run, as `--json` prints it; `seconds` is by step.

    `version`, `alias` and `serve` are set by runs that register a scorer, `training` by those that finetune, `decision`
    and `reasons` by those with a gate, and `cautions` if the data have problems.
    """

    run: str
    log: str
    selectors: Mapping[str, Mapping[str, float]]
    report: str
    version: str
    alias: str
    from_cache: Sequence[str]
    seconds: Mapping[str, float]
    serve: str
    training: Mapping[str, object]
    decision: str
    reasons: Sequence[str]
    cautions: Sequence[str]


def facts(outcome: "RunOutcome", tracking_uri: str = "") -> Facts:
    """The result of a run as JSON values; means and intervals of selectors are on the metric's scale of 0 to 1."""
    report = read_report(outcome.outputs["evaluation"])
    version = _step_facts(outcome, "registration")
    values: Facts = {
        "run": outcome.run_id,
        "log": str(outcome.log),
        "selectors": {name: vars(row.estimate) for name, row in report.selectors.items()},
        "report": str(_relative_path(outcome.outputs["evaluation"] / "report.html")),
    }
    if version:
        values |= {"version": version["uri"], "alias": version["alias"]}
    values["from_cache"] = [step for step in outcome.outputs if step in outcome.cached]
    values["seconds"] = dict(outcome.seconds)
    if version:
        values["serve"] = f"cappy serve --scorer {version['uri']}"
    if "finetuning" in outcome.outputs:
        manifest = read_manifest(outcome.outputs["finetuning"])
        values["training"] = {**manifest.metrics, **manifest.facts}
    if "promotion" in outcome.outputs:
        gate_facts = _step_facts(outcome, "promotion")
        values |= {
            "decision": gate_facts["decision"],
            "reasons": gate_facts["reasons"],
            "alias": gate_facts["serve"].rpartition("@")[2],
            "serve": _step_facts(outcome, "deployment").get("command") or gate_facts["serve"],
        }
    if texts := _run_cautions(outcome.outputs):
        values["cautions"] = texts
    if has_secret(tracking_uri):
        # The command may be copied into a shell history or a log.
        tracking_uri = ""
    if tracking_uri and "serve" in values:
        values["serve"] = f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri)} {values['serve']}"
    return values


def describe(outcome: "RunOutcome", values: Facts) -> str:
    """The table of the report and the facts of a run, as text for a terminal."""
    table = read_report(outcome.outputs["evaluation"]).text()
    lines = [table, f"report    {values['report']}"]
    if "version" in values:
        lines.append(f"version   {values['version']}, alias {values['alias']}")
    if "decision" in values:
        lines.append(_format_decision(values["decision"], values["reasons"]))
    lines += [f"caution   {text}" for text in values.get("cautions", ())]
    if head := values.get("training", {}).get("new_head"):
        lines.append(f"training  started from an encoder, so the scorer's head ({head}) is new")
    if values.get("training", {}).get("kept_because"):
        lines.append(f"training  {values['training']['kept_because']}")
    if values["from_cache"]:
        lines.append(f"cache     {', '.join(values['from_cache'])} came from the cache")
    return "\n".join([*lines, *([f"serve it  {values['serve']}"] if "serve" in values else [])])


def describe_step(manifest: Manifest, target: Path) -> list[str]:
    """Lines that summarise one step; none if its metrics are enough."""
    facts = manifest.facts
    if manifest.step == "evaluation":
        return [read_report(target).text(), f"report    {_relative_path(target / 'report.html')}"]
    if manifest.step in TRAINING_STEPS and facts.get("kept_because"):
        return [f"training  {facts['kept_because']}"]
    if manifest.step == "registration":
        return [f"version   {facts['uri']}, alias {facts['alias'] or 'none'}"]
    if manifest.step == "promotion":
        return [_format_decision(facts["decision"], facts["reasons"]), f"serve it  {facts['serve']}"]
    if manifest.step == "deployment":
        return [f"version   {facts['uri']}", f"next      {facts['command']}"]
    return []


def cautions(manifest: Manifest | None) -> list[str]:
    """Warnings about the data that a step wrote, each with a remedy."""
    if manifest is None:
        return []
    if manifest.step == "sampling":
        from cappy.sampling.statistics import cautions as sampling_cautions

        return sampling_cautions(manifest.metrics, manifest.config, manifest.facts)
    if manifest.step == "annotation":
        from cappy.annotation.step import describe_cautions

        return describe_cautions(manifest.metrics)
    return []


def _run_cautions(outputs: Mapping[str, Path]) -> list[str]:
    """Every caution once: sampling and annotation both warn about reasoning in the same responses."""
    manifests = {step: _find_manifest(folder) for step, folder in outputs.items()}
    sampling, annotation = manifests.get("sampling"), manifests.get("annotation")
    if annotation and sampling and sampling.metrics.get("reasoning"):
        other_metrics = {name: value for name, value in annotation.metrics.items() if name != "with_reasoning"}
        manifests["annotation"] = replace(annotation, metrics=other_metrics)
    return list(dict.fromkeys(text for manifest in manifests.values() for text in cautions(manifest)))


def _find_manifest(folder: Path) -> Manifest | None:
    """The manifest of a step's output; None if the output has no manifest."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def _format_decision(decision: str, reasons: Sequence[str]) -> str:
    outcome_text = "promoted to champion" if decision == "promote" else "hold: the version stays challenger"
    if any(reason.endswith("is already champion.") for reason in reasons):
        outcome_text = "unchanged"
    return "\n".join([f"decision  {outcome_text}", *(f"          {reason}" for reason in reasons)])


def _step_facts(outcome: "RunOutcome", step: str) -> Mapping[str, Any]:
    """The facts in the manifest of a step; {} if it did not run."""
    return read_manifest(outcome.outputs[step]).facts if step in outcome.outputs else {}


def _relative_path(path: Path) -> Path:
    """The path relative to the current folder if it is inside it."""
    current = Path.cwd()
    return path.relative_to(current) if path.is_relative_to(current) else path
