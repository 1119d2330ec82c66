"""Registers a scorer in MLflow: uploads its folder, a model card and a signature, and creates a version."""

import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas  # type: ignore[import-untyped]

from cappy import __version__
from cappy.evaluation.findings import ReportValues
from cappy.pages import escape_code, escape_text, metric_name, table
from cappy.records import Manifest, read_manifest
from cappy.records.folder import MANIFEST, sha256_of
from cappy.registry.client import MlflowClient, MlflowException, connect, experiment_id, metric_key
from cappy.registry.models import (
    CHALLENGER,
    CHAMPION,
    EVALUATION_TAGS,
    MANIFEST_TAG,
    REPORT_SUBJECT_TAG,
    RUN_TAG,
    TESTED_TAG,
    Version,
    report_subject,
)
from cappy.registry.tracking import step_run
from cappy.registry.versions import SCORER_PATH, find, find_content, is_intact
from cappy.selection.selectors import selectors_shown_in

MODEL = "model"
MLFLOW_RUN_TAG = "cappy.mlflow_run"
"""The MLflow run that holds the files of a version."""
REQUIREMENTS = [f"cappy-scorer=={__version__}", "torch>=2.10", "transformers>=5,<6", "safetensors", "mlflow>=3.16.1,<4"]
EXAMPLE = {"instruction": "Translate to French: cat", "response": "chat"}


@dataclass(frozen=True)
class Registration:
    """A scorer and its report to register as a version of the model `name`; `staging` is for temporary files."""

    scorer: Path
    manifest: Manifest
    report: Path
    report_values: ReportValues
    name: str
    licence: str
    experiment: str
    pipeline_run: str
    tracking_uri: str
    staging: Path

    @cached_property
    def card(self) -> str:
        """The text of MODEL_CARD.md."""
        return model_card(self.name, self.manifest, self.report_values, licence=self.licence)

    @cached_property
    def evaluation_hashes(self) -> dict[str, str]:
        """Tags with the sha256 of the evaluation files.

        Files that the report's manifest does not list are ignored: they may be left from an earlier evaluation.
        """
        files = {file.name: file.sha256 for file in read_manifest(self.report).files}
        return {tag: files[name] for name, tag in EVALUATION_TAGS.items() if name in files}

    @property
    def scorer_files(self) -> list[str]:
        """Names of the scorer's files, the manifest first."""
        return [MANIFEST, *(file.name for file in self.manifest.files)]


def register(registration: Registration) -> Version:
    """Registers a scorer and returns its version, which becomes challenger unless it is champion.

    A scorer that is registered already keeps its version; missing or damaged files are uploaded again.
    """
    with connect(registration.tracking_uri) as client:
        version = find_content(client, registration.name, registration.manifest.hash)
        # Another tool may have copied the content tag; only model versions created by cappy have MLFLOW_RUN_TAG, the
        # run that holds the files.
        if version is None or not version.tags.get(MLFLOW_RUN_TAG):
            version = _create(client, registration)
        elif not (
            _is_same_report(version, registration)
            and _has_all_files(client, version, registration)
            and is_intact(version, tracking_uri=registration.tracking_uri)
        ):
            _upload(client, version.tags[MLFLOW_RUN_TAG], registration)
            _update_tags(client, version, registration)
        if not {CHAMPION, CHALLENGER} & set(version.aliases):
            client.set_registered_model_alias(registration.name, CHALLENGER, str(version.number))
        return find(client, registration.name, str(version.number)) or version


def _create(client: MlflowClient, registration: Registration) -> Version:
    experiment = experiment_id(client, registration.experiment, registration.tracking_uri)
    run_id = step_run(client, experiment, registration.pipeline_run, "registration")
    _upload(client, run_id, registration)
    try:
        client.create_registered_model(registration.name, description="Scores how correct a response is.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        registration.name,
        source=f"{client.get_run(run_id).info.artifact_uri}/{MODEL}",
        run_id=run_id,
        tags={
            MANIFEST_TAG: registration.manifest.hash,
            RUN_TAG: registration.pipeline_run,
            MLFLOW_RUN_TAG: run_id,
            "cappy.step": _describe_producer(registration.manifest),
            TESTED_TAG: registration.report_values.get("tested_groups", ""),
            REPORT_SUBJECT_TAG: report_subject(registration.report_values),
            **registration.evaluation_hashes,
            **{f"cappy.{name}": f"{mean:.4f}" for name, mean in _mean_labels(registration.report_values).items()},
        },
        description=registration.card.partition("# ")[2],
    )
    client.set_terminated(run_id)
    version = find(client, registration.name, str(created.version))
    assert version is not None  # noqa: S101 (it was created above)
    return version


def _upload(client: MlflowClient, run_id: str, registration: Registration) -> None:
    """Logs the scorer as an MLflow model (code by path, no pickle) with its card, and the report next to it."""
    with tempfile.TemporaryDirectory(dir=registration.staging, prefix=".stage-") as folder:
        scorer, model = Path(folder) / "scorer", Path(folder) / MODEL
        _link(registration.scorer, scorer, registration.scorer_files)
        _link(
            registration.report,
            scorer,
            [name for name, tag in EVALUATION_TAGS.items() if tag in registration.evaluation_hashes],
        )
        _save_model(scorer, model)
        (model / "MODEL_CARD.md").write_text(registration.card, encoding="utf-8")
        client.log_artifacts(run_id, str(model), MODEL)
    client.log_artifacts(run_id, str(registration.report), "report")


def _save_model(scorer: Path, target: Path) -> None:
    """Writes an MLflow model that contains a scorer folder, with the signature instruction, response -> score."""
    with warnings.catch_warnings():
        # MLflow warns about its own type hints when pyfunc is imported.
        warnings.simplefilter("ignore")
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, Schema

        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"scorer": str(scorer)},
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.string, name) for name in EXAMPLE]),
                outputs=Schema([ColSpec(DataType.double, "score")]),
            ),
            input_example=pandas.DataFrame([EXAMPLE]),
            pip_requirements=REQUIREMENTS,
        )


def _link(source: Path, target: Path, names: list[str]) -> None:
    """Hard-links files into a folder, or copies them where links are not possible."""
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, path)
        except OSError:
            shutil.copyfile(source / name, path)


def _is_same_report(version: Version, registration: Registration) -> bool:
    """Whether the evaluation files of the version are those of this report."""
    return all(
        version.tags.get(tag, "") == registration.evaluation_hashes.get(tag, "") for tag in EVALUATION_TAGS.values()
    )


def _has_all_files(client: MlflowClient, version: Version, registration: Registration) -> bool:
    """Whether the artifact store has every file with the right size.

    The evaluation files are compared by sha256, since a different file of the same size would make downloads fail.
    """
    root = f"{MODEL}/{SCORER_PATH}"
    run_id = version.tags[MLFLOW_RUN_TAG]
    parents = {str(Path(root) / Path(file.name).parent) for file in registration.manifest.files}
    sizes = {item.path: item.file_size for parent in parents for item in client.list_artifacts(run_id, parent)}
    sizes_match = all(
        sizes.get(f"{root}/{name}") == (registration.scorer / name).stat().st_size for name in registration.scorer_files
    )
    return sizes_match and all(
        _stored_sha256(client, run_id, f"{root}/{name}", sizes) == version.tags.get(tag, "")
        for name, tag in EVALUATION_TAGS.items()
    )


def _stored_sha256(client: MlflowClient, run_id: str, path: str, sizes: Mapping[str, int]) -> str:
    """The sha256 of a file in the store; empty if it is missing."""
    if path not in sizes:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        return sha256_of(Path(client.download_artifacts(run_id, path, folder)))


def _update_tags(client: MlflowClient, version: Version, registration: Registration) -> None:
    """Sets the tags of a version to those of this report, after its files were uploaded again."""
    subject = report_subject(registration.report_values)
    client.set_model_version_tag(version.name, str(version.number), REPORT_SUBJECT_TAG, subject)
    for tag in EVALUATION_TAGS.values():
        if tag in registration.evaluation_hashes:
            client.set_model_version_tag(version.name, str(version.number), tag, registration.evaluation_hashes[tag])
        elif tag in version.tags:
            client.delete_model_version_tag(version.name, str(version.number), tag)


def _mean_labels(report: ReportValues) -> dict[str, float]:
    """The mean label of each selector that the report shows by task, except upper bounds and the champion."""
    metric = report.get("metric", "label")
    means = {name: row["estimate"]["mean"] for name, row in report.get("selectors", {}).items()}
    selectors = selectors_shown_in(means, "tasks")
    shown = [selector for selector in selectors if selector.bound != "upper" and selector.scorer != "champion"]
    return {metric_key(f"{metric}_{selector.name}"): means[selector.name] for selector in shown}


_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
license: {licence}
tags: [cappy, reranking, best-of-n]
---

# {title}

A scorer: it reads an instruction and a candidate response and returns one number, about 0 to 1, that says how correct
the response is. It was made by the step `{step}` of Cappy.

## What it is for

Picking the best of several responses that a language model sampled for a task like those below, or classifying by
scoring every choice. The language model is not changed.

It does not judge truth, style or safety, nor responses to tasks that it was not evaluated on. It was trained on
{metric} as the label and cannot judge what that metric does not measure. Scores of different instructions are only as
comparable as the calibration below says.

## Evaluation results

{verdict}

{advice}

{selectors}

Measured on {instances} instances of the split `{split}`, on which it was not trained unless a caution above says
otherwise.

{tasks}

{calibration}

## What it was trained on

- generators: {generators}
- seed: {seed}
- manifest: `{hash}`
- made from: {parents}
- made by: {made_by}
- recipe: `{recipe}`
- licence of the base encoder: {stated_licence}

## How to use it

```python
from cappy.scoring import Scorer

scorer = Scorer.load({quoted})
scorer.score([("Translate to French: cat", "chat")])
```

`cappy serve --scorer {address}` serves it over HTTP. The folder also loads with
`AutoModelForSequenceClassification` and with the `CrossEncoder` of sentence-transformers; pairs that are not truncated
get the same scores there. `calibration.json` next to the weights, if present, maps the score of a pick and its number
of candidates to the expected {metric}.
"""
_LICENCE = re.compile(r"[A-Za-z0-9.+-]+")


def model_card(name: str, scorer: Manifest, report: ReportValues, *, licence: str = "") -> str:
    """The text of MODEL_CARD.md; `licence` is the SPDX identifier of the encoder's licence, empty if unknown."""
    facts = report.get("facts", {})
    metric = escape_text(metric_name(str(report.get("metric", "label"))))
    address = f"models:/{escape_code(name)}@champion"
    return _CARD.format(
        title=escape_text(name),
        quoted=json.dumps(address, ensure_ascii=False),
        address=shlex.quote(address),
        licence=licence if _LICENCE.fullmatch(licence) else "other",
        stated_licence=escape_text(
            licence or "not stated; ask before you pass the scorer on (cappy registration --licence)"
        ),
        step=escape_code(scorer.step or "unknown"),
        verdict="\n".join(f"- {escape_text(str(sentence))}" for sentence in report.get("verdict", ()))
        or "Not evaluated.",
        advice=escape_text(str(report.get("next", ""))),
        metric=metric,
        selectors=_selector_table(report),
        tasks=_task_table(report.get("tasks", ())),
        calibration=_calibration_sentence(report.get("calibration")),
        instances=escape_text(str(facts.get("instances", "unknown"))),
        split=escape_code(str(report.get("split", "test"))),
        generators=escape_text(", ".join(f"{key} ({value[:12]})" for key, value in scorer.generators.items()))
        or "none recorded",
        seed="none recorded" if scorer.seed is None else escape_text(str(scorer.seed)),
        hash=scorer.hash,
        parents=", ".join(f"`{escape_code(parent[:12])}`" for parent in scorer.parents) or "nothing recorded",
        made_by=escape_text(_describe_producer(scorer)),
        recipe=escape_code(json.dumps(scorer.config, sort_keys=True).replace("<", "\\u003c")),
    )


def _describe_producer(scorer: Manifest) -> str:
    """The step that made a scorer and its version, or the hash of the code for earlier releases."""
    if scorer.step_version:
        return f"{scorer.step} version {scorer.step_version}"
    return f"{scorer.step} by code {scorer.code}" if scorer.code else f"{scorer.step or 'a step'}, version not recorded"


def _selector_table(report: ReportValues) -> str:
    """A table of the mean of every selector with its interval."""
    rows = [_selector_row(selector, values) for selector, values in report.get("selectors", {}).items()]
    metric = metric_name(str(report.get("metric", "label")))
    return table([("selector", f"{metric} x100", "95% interval"), *rows])


def _task_table(tasks: Sequence[ReportValues]) -> str:
    """A table by task: instances, random choice, the scorer."""
    rows = [
        (
            str(task["task"] or "(no task)"),
            str(task["instances"]),
            f"{100 * task['means'].get('random', 0):.1f}",
            f"{100 * task['means']['scorer']:.1f}",
        )
        for task in tasks
        if "scorer" in task["means"]
    ]
    return table([("task", "instances", "random choice", "scorer"), *rows]) if rows else ""


def _calibration_sentence(values: ReportValues | None) -> str:
    if not values:
        return "Calibration was not measured."
    raw, calibrated = values["raw"], values.get("calibrated")
    after = f", {100 * calibrated['ece']:.1f} with `calibration.json`" if calibrated else "; no calibration was fitted"
    return (
        f"Calibration error of picks x100 (score against label, ten bins): {100 * raw['ece']:.1f} uncalibrated{after}."
    )


def _selector_row(selector: str, values: ReportValues) -> tuple[str, str, str]:
    estimate = values["estimate"]
    interval = f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"
    return selector, f"{100 * estimate['mean']:.1f}", interval
