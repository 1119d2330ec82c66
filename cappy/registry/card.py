"""The model card of a registered version, as Markdown."""

import json
import re
import shlex
from collections.abc import Sequence

from cappy.evaluation.findings import ReportValues
from cappy.pages import escape_code, escape_text, metric_name, table
from cappy.records import Manifest
from cappy.selection.linear import Selector

_CARD = """\
---
library_name: transformers
pipeline_tag: text-classification
license: {licence}
tags: [cappy, reranking, best-of-n]
---

# {title}

A scorer: it reads an instruction and a candidate response and returns one number, about 0 to 1, that says how correct
the response is. It was made by the step `{step}` of Cappy. With it comes the selector that was evaluated (below), which
picks one of several responses.

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

## How it picks

{selector}

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
scorer.select("Translate to French: cat", ["chat", "chien"]).response
```

`cappy serve --scorer {address}` serves it over HTTP. The folder also loads with
`AutoModelForSequenceClassification` and with the `CrossEncoder` of sentence-transformers; pairs that are not truncated
get the same scores there. `calibration.json` next to the weights, if present, maps the score of a pick and its number
of candidates to the expected {metric}.
"""
_LICENCE = re.compile(r"[A-Za-z0-9.+-]+")


def model_card(
    name: str, scorer: Manifest, report: ReportValues, *, selector: Selector | None = None, licence: str = ""
) -> str:
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
        selector=_describe_selector(selector or Selector()),
        instances=escape_text(str(facts.get("instances", "unknown"))),
        split=escape_code(str(report.get("split", "test"))),
        generators=escape_text(", ".join(f"{key} ({value[:12]})" for key, value in scorer.generators.items()))
        or "none recorded",
        seed="none recorded" if scorer.seed is None else escape_text(str(scorer.seed)),
        hash=scorer.hash,
        parents=", ".join(f"`{escape_code(parent[:12])}`" for parent in scorer.parents) or "nothing recorded",
        made_by=escape_text(describe_producer(scorer)),
        recipe=escape_code(json.dumps(scorer.config, sort_keys=True).replace("<", "\\u003c")),
    )


def _describe_selector(selector: Selector) -> str:
    """What the selector picks by, as text and a table with a row for each set of features that a caller may have."""
    if selector.evidence is None:
        return "By the score alone: there were too few held-out instances to fit a selector on."
    rows = [("known", "picks by", "gain over the best single feature x100 ± its standard error")]
    rows += [
        (
            ", ".join(rule.features),
            rule.text,
            f"{100 * rule.gain:+.1f} (standard error {100 * rule.standard_error:.1f})",
        )
        for rule in selector.rules
    ]
    greedy = f" Greedy stands for the decoding {escape_code(selector.decoding)}." if selector.decoding else ""
    return (
        f"`selector.json` has weights for each set of features that a caller may know, fitted on {selector.groups} "
        f"{selector.evidence} groups labelled by {escape_text(selector.metric)}. A rule that cross-validation did not "
        f"show to be better by one standard error is the best single feature.{greedy}\n\n{table(rows)}"
    )


def describe_producer(scorer: Manifest) -> str:
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
    """A table by task: instances, random choice, the selector."""
    rows = [
        (
            str(task["task"] or "(no task)"),
            str(task["instances"]),
            f"{100 * task['means'].get('random', 0):.1f}",
            f"{100 * task['means']['selector']:.1f}",
        )
        for task in tasks
        if "selector" in task["means"]
    ]
    return table([("task", "instances", "random choice", "selector"), *rows]) if rows else ""


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
