"""The model card: what the scorer is, what it was trained on, what it is worth, how to load it."""

import json
import re
import shlex
from collections.abc import Sequence

from cappy.evaluation.findings import ReportValues
from cappy.pages.words import code, metric_name, table, text
from cappy.records import Manifest

_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
license: {licence}
tags: [cappy, reranking, best-of-n]
---

# {title}

A scorer: it reads an instruction and a candidate response and answers with one number, about 0 to 1, that says how
correct the response is. It was made by the step `{step}` of Cappy.

## What it is for

Picking the best of several responses that a language model sampled for a task like those below, or classifying by
scoring every choice. The language model stays as it is.

It is not a judge of truth, style or safety, nor of tasks that it was not evaluated on. Its label is {metric}: what that
metric does not see, the scorer was not taught. Scores of different instructions compare only as far as the calibration
below holds.

## What it is worth

{verdict}

{advice}

{selectors}

Measured on {instances} instances of the split `{split}`, on which it was not trained unless a caution above says so.

{tasks}

{calibration}

## What it was trained on

- generators: {generators}
- seed: {seed}
- manifest: `{hash}`
- made from: {parents}
- made by: {made_by}
- recipe: `{recipe}`
- licence of the encoder that it started from: {stated_licence}

## How to use it

```python
from cappy.scoring import Scorer

scorer = Scorer.load({quoted})
scorer.score([("Translate to French: cat", "chat")])
```

`cappy serve --scorer {address}` serves it over HTTP. The folder also loads with
`AutoModelForSequenceClassification` and with the `CrossEncoder` of sentence-transformers; pairs that fit have the same
numbers there. `calibration.json` beside the weights, where there is one, maps the score of a pick, and the number of
candidates that it is the best of, to the {metric} that is expected.
"""
_LICENCE = re.compile(r"[A-Za-z0-9.+-]+")


def model_card(name: str, scorer: Manifest, report: ReportValues, *, licence: str = "") -> str:
    """The text of MODEL_CARD.md; `licence` is that of the encoder, as an SPDX identifier, empty where nobody said."""
    facts = report.get("facts", {})
    metric = text(metric_name(str(report.get("metric", "label"))))
    address = f"models:/{code(name)}@champion"
    return _CARD.format(
        title=text(name),
        quoted=json.dumps(address, ensure_ascii=False),
        address=shlex.quote(address),
        licence=licence if _LICENCE.fullmatch(licence) else "other",
        stated_licence=text(licence or "not stated; ask before you pass the scorer on (cappy registration --licence)"),
        step=code(scorer.step or "unknown"),
        verdict="\n".join(f"- {text(str(sentence))}" for sentence in report.get("verdict", ())) or "Not evaluated.",
        advice=text(str(report.get("next", ""))),
        metric=metric,
        selectors=_selectors(report),
        tasks=_tasks(report.get("tasks", ())),
        calibration=_calibration(report.get("calibration")),
        instances=text(str(facts.get("instances", "unknown"))),
        split=code(str(report.get("split", "test"))),
        generators=text(", ".join(f"{key} ({value[:12]})" for key, value in scorer.generators.items()))
        or "none recorded",
        seed="none recorded" if scorer.seed is None else text(str(scorer.seed)),
        hash=scorer.hash,
        parents=", ".join(f"`{code(parent[:12])}`" for parent in scorer.parents) or "nothing recorded",
        made_by=text(f"{scorer.step} version {scorer.step_version}") if scorer.step_version else "not recorded",
        recipe=code(json.dumps(scorer.config, sort_keys=True).replace("<", "\\u003c")),
    )


def _selectors(report: ReportValues) -> str:
    """The mean of every selector with its interval."""
    rows = [_row(selector, values) for selector, values in report.get("selectors", {}).items()]
    metric = metric_name(str(report.get("metric", "label")))
    return table([("selector", f"{metric} x100", "95% interval"), *rows])


def _tasks(tasks: Sequence[ReportValues]) -> str:
    """Task by task: how many instances, random choice, the scorer."""
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


def _calibration(found: ReportValues | None) -> str:
    if not found:
        return "Calibration was not measured."
    raw, mapped = found["raw"], found.get("calibrated")
    after = f", {100 * mapped['ece']:.1f} with `calibration.json`" if mapped else "; no calibration was fitted"
    return f"Calibration error of picks x100 (score to label, ten bins): {100 * raw['ece']:.1f} as it is{after}."


def _row(selector: str, values: ReportValues) -> tuple[str, str, str]:
    estimate = values["estimate"]
    interval = f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"
    return selector, f"{100 * estimate['mean']:.1f}", interval
