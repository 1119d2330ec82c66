"""Evaluation: compares the scorer with every other selector."""

from typing import Any

from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components import component


@component()
def evaluation(
    annotated: Input[Dataset],
    report: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
    scorer: Input[Model] = None,
    champion: str = "",
    metric: str = "rougeL",
    settings: str = "",
    fingerprint: str = "",
) -> None:
    """Compare the run's scorer, else the one in the settings, and the champion with the other selectors."""
    import shutil
    from pathlib import Path

    from cappy.worker import launch

    trained = {"scorer": scorer.path} if scorer is not None else {}
    values: dict[str, Any] = {"champion": champion, "metric": metric, **trained}
    folders = {"source": annotated.path, "target": report.path}
    manifest = launch("evaluation", settings, fingerprint=fingerprint, **values, **folders)
    report.metadata.update(manifest=manifest.hash)
    metrics.metadata.update(manifest.metrics)
    shutil.copyfile(f"{report.path}/report.html", page.path)
    # The local cache ignores an artifact without a file.
    Path(metrics.path).write_text(str(dict(manifest.metrics)))
