"""Registers a scorer in MLflow: uploads its folder, a model card and a signature, and creates a version."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas  # type: ignore[import-untyped]

from cappy import __version__
from cappy.evaluation.findings import ReportValues
from cappy.records import Manifest, read_manifest
from cappy.records.folder import MANIFEST, sha256_of
from cappy.registry.card import describe_producer, model_card
from cappy.registry.client import MlflowClient, MlflowException, connect, experiment_id, metric_key
from cappy.registry.models import (
    CHALLENGER,
    CHAMPION,
    EVALUATION_TAGS,
    MANIFEST_TAG,
    REPORT_SUBJECT_TAG,
    RUN_TAG,
    SELECTOR_TAG,
    TESTED_TAG,
    Version,
    report_subject,
)
from cappy.registry.tracking import step_run
from cappy.registry.versions import SCORER_PATH, find, find_content, is_intact
from cappy.selection.linear import read_selector
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
        return model_card(
            self.name,
            self.manifest,
            self.report_values,
            selector=read_selector(self.report) if SELECTOR_TAG in self.evaluation_hashes else None,
            licence=self.licence,
        )

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

    A scorer that is registered with the same selector keeps its version; missing or damaged files are uploaded again.
    """
    with connect(registration.tracking_uri) as client:
        selector_hash = registration.evaluation_hashes.get(SELECTOR_TAG, "")
        version = find_content(client, registration.name, registration.manifest.hash, selector_hash)
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
            "cappy.step": describe_producer(registration.manifest),
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
        save_model(scorer, model)
        (model / "MODEL_CARD.md").write_text(registration.card, encoding="utf-8")
        client.log_artifacts(run_id, str(model), MODEL)
    client.log_artifacts(run_id, str(registration.report), "report")


def save_model(scorer: Path, target: Path) -> None:
    """Writes an MLflow model that contains a scorer folder, with the signature instruction, response -> score.

    With the parameter `select` it returns 1 for the row that the selector picks among those of an instruction, else 0;
    then the optional columns `likelihood` and `greedy` are used too.
    """
    with warnings.catch_warnings():
        # MLflow warns about its own type hints when pyfunc is imported.
        warnings.simplefilter("ignore")
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"scorer": str(scorer)},
            signature=ModelSignature(
                inputs=Schema(
                    [
                        *(ColSpec(DataType.string, name) for name in EXAMPLE),
                        ColSpec(DataType.double, "likelihood", required=False),
                        *(ColSpec(DataType.boolean, name, required=False) for name in ("greedy", "truncated")),
                    ]
                ),
                outputs=Schema([ColSpec(DataType.double, "score")]),
                params=ParamSchema(
                    [ParamSpec(name, DataType.boolean, default=False) for name in ("select", "closed_choices")]
                ),
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
    """The mean label of each selector that the report shows by task, except upper bounds and those of other scorers."""
    metric = report.get("metric", "label")
    means = {name: row["estimate"]["mean"] for name, row in report.get("selectors", {}).items()}
    selectors = selectors_shown_in(means, "tasks")
    shown = [
        selector
        for selector in selectors
        if selector.bound != "upper" and selector.scorer not in ("champion", "initial")
    ]
    return {metric_key(f"{metric}_{selector.name}"): means[selector.name] for selector in shown}
