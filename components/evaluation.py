"""Evaluation: how much the scorer helps, against every other selector."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components.component import component


@component()
def evaluation(
    annotated: Input[Dataset],
    report: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
    scorer: Input[Model] = None,
    champion: str = "",
    metric: str = "rougeL",
    seed: int = 0,
    settings: str = "",
    fingerprint: str = "",
    run: str = "",
) -> None:
    """Compare a scorer, and the champion beside it, with the other selectors on held-out instances.

    The scorer is the one that the run trained, or the one that the settings name.
    """
    import shutil
    from pathlib import Path

    from cappy.steps import launch

    folders = {"source": annotated.path, "target": report.path}
    if scorer is not None:
        folders["scorer"] = scorer.path
    done = launch(
        "evaluation",
        settings,
        fingerprint=fingerprint,
        run=run,
        champion=champion,
        metric=metric,
        seed=seed,
        **folders,
    )
    report.metadata.update(manifest=done.hash)
    metrics.metadata.update(done.metrics)
    shutil.copyfile(f"{report.path}/report.html", page.path)
    # The local cache takes no answer whose artifact has no file.
    Path(metrics.path).write_text(str(dict(done.metrics)))
