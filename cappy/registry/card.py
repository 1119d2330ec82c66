"""The model card: what the scorer is, what it was trained on, what it is worth, how to load it."""

from collections.abc import Mapping
from typing import Any

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
correct the response is. It picks the best of several responses of a language model, or classifies by scoring every
choice. It was made by the step `{step}` of Cappy.

## What it is worth

{verdict}

| selector | {metric} x100 | 95% interval |
|---|---|---|
{rows}

Measured on {instances} instances of the split `{split}`, on which it was not trained unless a caution above says so.

## What it was trained on

- generators: {generators}
- seed: {seed}
- manifest: `{hash}`
- made from: {parents}

## How to use it

```python
from cappy.scoring import Scorer

scorer = Scorer.load("models:/{name}@champion")
scorer.score([("Translate to French: cat", "chat")])
```

`cappy serve --scorer models:/{name}@champion` serves it over HTTP. The folder also loads with
`AutoModelForSequenceClassification` and with the `CrossEncoder` of sentence-transformers.
"""


def model_card(name: str, scorer: Manifest, report: Mapping[str, Any], *, licence: str = "apache-2.0") -> str:
    """The text of MODEL_CARD.md."""
    facts = report.get("facts", {})
    rows = [_row(selector, values) for selector, values in report.get("selectors", {}).items()]
    return _CARD.format(
        name=name,
        licence=licence,
        step=scorer.step or "unknown",
        verdict="\n".join(f"- {sentence}" for sentence in report.get("verdict", ())) or "Not evaluated.",
        metric=report.get("metric", "label"),
        rows="\n".join(rows),
        instances=facts.get("instances", "unknown"),
        split=report.get("split", "test"),
        generators=", ".join(f"{key} ({value[:12]})" for key, value in scorer.generators.items()) or "none recorded",
        seed="none recorded" if scorer.seed is None else scorer.seed,
        hash=scorer.hash,
        parents=", ".join(f"`{parent[:12]}`" for parent in scorer.parents) or "nothing recorded",
    )


def _row(selector: str, values: Mapping[str, Any]) -> str:
    estimate = values["estimate"]
    interval = f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"
    return f"| {selector} | {100 * estimate['mean']:.1f} | {interval} |"
