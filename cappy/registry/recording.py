"""Puts a scorer into MLflow: its folder, its model card, a signature, and the version that points at them."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]

from cappy import __version__
from cappy.records import Manifest, read_manifest
from cappy.records.folder import MANIFEST, sha256_of
from cappy.registry.card import model_card
from cappy.registry.client import MlflowException, connected, experiment_id, metric_key
from cappy.registry.models import (
    CHALLENGER,
    CHAMPION,
    EVALUATED,
    EVIDENCE_TAG,
    MANIFEST_TAG,
    RUN_TAG,
    TESTED_TAG,
    Version,
    evidence_of,
)
from cappy.registry.registration import RegistrationConfig
from cappy.registry.tracking import step_run
from cappy.registry.versions import SCORER_PATH, find, find_content, intact

MODEL = "model"
REQUIREMENTS = [f"cappy-scorer=={__version__}", "torch>=2.10", "transformers>=5,<6", "safetensors", "mlflow>=3.16.1,<4"]
EXAMPLE = {"instruction": "Translate to French: cat", "response": "chat"}


def register(config: RegistrationConfig, scorer: Manifest, report: Mapping[str, Any], folder: Path) -> Version:
    """The version that holds this scorer, made if there is none; it is challenger unless it is champion.

    Files are staged under `folder`. A version whose files are gone from the artifact store or damaged gets them again.
    """
    with connected(config.tracking_uri) as client:
        known = find_content(client, config.name, scorer.hash)
        # Another tool can have copied the tag of the content; only our own say which run holds the files.
        if known is None or not known.tags.get("cappy.mlflow_run"):
            known = _create(client, config, scorer, report, folder)
        elif not (
            _is_same_report(known, config)
            and _complete(client, known, config, scorer)
            and intact(known, tracking_uri=config.tracking_uri)
        ):
            _upload(client, known.tags["cappy.mlflow_run"], config, scorer, report, folder)
            _retag(client, known, config, report)
        if not {CHAMPION, CHALLENGER} & set(known.aliases):
            client.set_registered_model_alias(config.name, CHALLENGER, str(known.number))
        return find(client, config.name, str(known.number)) or known


def _create(
    client: Any, config: RegistrationConfig, scorer: Manifest, report: Mapping[str, Any], folder: Path
) -> Version:
    experiment = experiment_id(client, config.experiment, config.tracking_uri)
    run_id = step_run(client, experiment, config.pipeline_run, "registration")
    _upload(client, run_id, config, scorer, report, folder)
    try:
        client.create_registered_model(config.name, description="Scores how correct a response is.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        config.name,
        source=f"{client.get_run(run_id).info.artifact_uri}/{MODEL}",
        run_id=run_id,
        tags={
            MANIFEST_TAG: scorer.hash,
            RUN_TAG: config.pipeline_run,
            "cappy.mlflow_run": run_id,
            "cappy.step": f"{scorer.step} {scorer.step_version}",
            TESTED_TAG: report.get("tested_groups", ""),
            EVIDENCE_TAG: evidence_of(report),
            **_evaluated(config),
            **{f"cappy.{name}": f"{mean:.4f}" for name, mean in _means(report).items()},
        },
        description=model_card(config.name, scorer, report, licence=config.licence).partition("# ")[2],
    )
    client.set_terminated(run_id)
    found = find(client, config.name, str(made.version))
    assert found is not None  # noqa: S101 (it was made a line above)
    return found


def _upload(
    client: Any, run_id: str, config: RegistrationConfig, scorer: Manifest, report: Mapping[str, Any], folder: Path
) -> None:
    """Logs the scorer as an MLflow model (code by path, no pickle), with its card, and the report beside it."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".stage-") as staged:
        plain, model = Path(staged) / "scorer", Path(staged) / MODEL
        _link(config.scorer, plain, [MANIFEST, *(file.name for file in scorer.files)])
        tags = _evaluated(config)
        _link(config.report, plain, [name for name, tag in EVALUATED.items() if tag in tags])
        _save(plain, model)
        card = model_card(config.name, scorer, report, licence=config.licence)
        (model / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        client.log_artifacts(run_id, str(model), MODEL)
    client.log_artifacts(run_id, str(config.report), "report")


def _evaluated(config: RegistrationConfig) -> dict[str, str]:
    """Tags with the sha256 of what the evaluation wrote for the scorer; none for what its manifest does not name.

    A file that an earlier evaluation left in the folder is not this one's.
    """
    files = {file.name: file.sha256 for file in read_manifest(config.report).files}
    return {tag: files[name] for name, tag in EVALUATED.items() if name in files}


def _save(scorer: Path, target: Path) -> None:
    """Writes the MLflow model that holds a scorer folder, with the signature instruction, response -> score."""
    with warnings.catch_warnings():
        # MLflow warns of its own type hints when pyfunc is imported.
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
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, path)
        except OSError:
            shutil.copyfile(source / name, path)


def _is_same_report(version: Version, config: RegistrationConfig) -> bool:
    """Whether what travels with the version is what this report left for it: a new report replaces the old one's."""
    now = _evaluated(config)
    return all(version.tags.get(tag, "") == now.get(tag, "") for tag in EVALUATED.values())


def _complete(client: Any, version: Version, config: RegistrationConfig, scorer: Manifest) -> bool:
    """Whether the artifact store still has every file, with its size.

    What the evaluation wrote is read and compared: another file of its size would make every download fail.
    """
    top = f"{MODEL}/{SCORER_PATH}"
    run_id = version.tags["cappy.mlflow_run"]
    parents = {str(Path(top) / Path(file.name).parent) for file in scorer.files}
    sizes = {item.path: item.file_size for parent in parents for item in client.list_artifacts(run_id, parent)}
    names = [MANIFEST, *(file.name for file in scorer.files)]
    whole = all(sizes.get(f"{top}/{name}") == (config.scorer / name).stat().st_size for name in names)
    return whole and all(
        _stored(client, run_id, f"{top}/{name}", sizes) == version.tags.get(tag, "") for name, tag in EVALUATED.items()
    )


def _stored(client: Any, run_id: str, path: str, sizes: Mapping[str, int]) -> str:
    """The sha256 of a file in the store; empty where there is none."""
    if path not in sizes:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        return sha256_of(Path(client.download_artifacts(run_id, path, folder)))


def _retag(client: Any, version: Version, config: RegistrationConfig, report: Mapping[str, Any]) -> None:
    """The tags of a version whose files were put back: what travels is that of the report at hand, or gone."""
    client.set_model_version_tag(version.name, str(version.number), EVIDENCE_TAG, evidence_of(report))
    now = _evaluated(config)
    for tag in EVALUATED.values():
        if tag in now:
            client.set_model_version_tag(version.name, str(version.number), tag, now[tag])
        elif tag in version.tags:
            client.delete_model_version_tag(version.name, str(version.number), tag)


def _means(report: Mapping[str, Any]) -> dict[str, float]:
    """The mean label of the selectors that people ask for, by metric and selector."""
    metric = report.get("metric", "label")
    selectors = report.get("selectors", {})
    return {
        metric_key(f"{metric}_{name}"): selectors[name]["estimate"]["mean"]
        for name in ("scorer", "random", "mbr", "hybrid_mbr")
        if name in selectors
    }
