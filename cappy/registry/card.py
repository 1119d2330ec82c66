"""The model card: what the scorer is, what it was trained on, what it is worth, how to load it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cappy.pages.words import metric_name
from cappy.records import Manifest

_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
license: {licence}
tags: [cappy, reranking, best-of-n]
---

# {name}

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

| selector | {metric} x100 | 95% interval |
|---|---|---|
{rows}

Measured on {instances} instances of the split `{split}`, on which it was not trained unless a caution above says so.

{tasks}

{calibration}

## What it was trained on

- generators: {generators}
- seed: {seed}
- manifest: `{hash}`
- made from: {parents}
- code: `{code}` (sha256 over the library)
- recipe: `{recipe}`
- licence of the encoder that it started from: {licence_told}

## How to use it

```python
from cappy.scoring import Scorer

scorer = Scorer.load("models:/{name}@champion")
scorer.score([("Translate to French: cat", "chat")])
```

`cappy serve --scorer models:/{name}@champion` serves it over HTTP. The folder also loads with
`AutoModelForSequenceClassification` and with the `CrossEncoder` of sentence-transformers. `calibration.json` beside the
weights, where there is one, maps scores to the {metric} that is expected.
"""


def model_card(name: str, scorer: Manifest, report: Mapping[str, Any], *, licence: str = "") -> str:
    """The text of MODEL_CARD.md; `licence` is that of the encoder, as an SPDX identifier, empty where nobody said."""
    facts = report.get("facts", {})
    rows = [_row(selector, values) for selector, values in report.get("selectors", {}).items()]
    return _CARD.format(
        name=name,
        licence=licence or "other",
        licence_told=licence or "not stated; ask before you pass the scorer on (cappy registration --licence)",
        step=scorer.step or "unknown",
        verdict="\n".join(f"- {sentence}" for sentence in report.get("verdict", ())) or "Not evaluated.",
        advice=report.get("next", ""),
        metric=metric_name(report.get("metric", "label")),
        rows="\n".join(rows),
        tasks=_tasks(report.get("tasks", ())),
        calibration=_calibration(report.get("calibration")),
        instances=facts.get("instances", "unknown"),
        split=report.get("split", "test"),
        generators=", ".join(f"{key} ({value[:12]})" for key, value in scorer.generators.items()) or "none recorded",
        seed="none recorded" if scorer.seed is None else scorer.seed,
        hash=scorer.hash,
        parents=", ".join(f"`{parent[:12]}`" for parent in scorer.parents) or "nothing recorded",
        code=scorer.code or "not recorded",
        recipe=json.dumps(scorer.config, sort_keys=True).replace("`", "'"),
    )


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Task by task: how many instances, random choice, the scorer."""
    rows = [
        f"| {task['task'] or '(no task)'} | {task['instances']} | {100 * task['means'].get('random', 0):.1f} "
        f"| {100 * task['means']['scorer']:.1f} |"
        for task in tasks
        if "scorer" in task["means"]
    ]
    return "\n".join(["| task | instances | random choice | scorer |", "|---|---|---|---|", *rows]) if rows else ""


def _calibration(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "Calibration was not measured."
    raw, mapped = found["raw"], found.get("calibrated")
    after = f", {100 * mapped['ece']:.1f} with `calibration.json`" if mapped else "; no calibration was fitted"
    return f"Calibration error x100 (distance of score and label, ten bins): {100 * raw['ece']:.1f} as it is{after}."


def _row(selector: str, values: Mapping[str, Any]) -> str:
    estimate = values["estimate"]
    interval = f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"
    return f"| {selector} | {100 * estimate['mean']:.1f} | {interval} |"
