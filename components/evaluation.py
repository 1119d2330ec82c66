"""Evaluation: how much the scorer helps, against every other selector."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components.component import component


@component()
def evaluation(
    annotated: Input[Dataset],
    scorer: Input[Model],
    report: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
    champion: str = "",
    metric: str = "rougeL",
    seed: int = 0,
    settings: str = "",
    fingerprint: str = "",
    run: str = "",
) -> None:
    """Compare the scorer, and the champion beside it, with the other selectors on held-out instances."""
    import shutil
    from pathlib import Path

    from cappy.steps import launch

    changed = {"champion": champion, "metric": metric, "seed": seed}
    folders = {"source": annotated.path, "scorer": scorer.path, "target": report.path}
    done = launch("evaluation", settings, fingerprint=fingerprint, run=run, **changed, **folders)
    report.metadata.update(manifest=done.hash)
    metrics.metadata.update(done.metrics)
    shutil.copyfile(f"{report.path}/report.html", page.path)
    # The local cache takes no answer whose artifact has no file.
    Path(metrics.path).write_text(str(dict(done.metrics)))
