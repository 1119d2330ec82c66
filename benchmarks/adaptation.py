"""What adaptation gains on samples of a real LLM, by number of candidates and of training instances, with a plot.

    python benchmarks/adaptation.py [--pools qwen05_small FILE ...] [--instances 16 64 0] [--start builtin]

A run is a pool (of `shared/data/candidates`, or a file of the same form), a number of training instances of each fold
(0: all) and a seed. The scorer is finetuned once per fold with `cappy adapt`'s defaults, and every instance is tested
by a scorer and a selector that were fitted on other folds; "initial" is the scorer that finetuning starts from. The
selector is fitted on all other folds, so runs on fewer training instances have none.

A finished run is a file in `benchmarks/results/adaptation/`, with the label of each pick, and is not repeated.
`benchmarks/results/adaptation.json` has the tables over all seeds, x 100 with 95 % intervals (over instances), and
`docs/images/adaptation.svg` the plot.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from selection import CANDIDATES, ROOT, SETS, progress, take_instances, times_100
from starts import annotate, start_name

from cappy.config import build
from cappy.evaluation.crossfit import CrossFitting, evaluate_folds
from cappy.evaluation.page import COLOURS, DEFAULT_COLOUR
from cappy.evaluation.protocol import build_report
from cappy.evaluation.statistics import compare, estimate_means
from cappy.pages.page import INK, draw_figure, plain_axes, to_svg_file
from cappy.progress import Progress
from cappy.records import read
from cappy.scoring import Scorer
from cappy.selection.pools import pick_label
from cappy.selection.selectors import title
from cappy.training.finetuning import FinetuningConfig
from cappy.training.finetuning import run as finetuning

FOLDS = 5
ROWS = ("random", "greedy", "likelihood_mean", "mbr", "initial", "scorer", "selector", "oracle")
COMPARISONS = (
    ("scorer", "initial"),
    ("selector", "greedy"),
    ("selector", "likelihood_mean"),
    ("selector", "mbr"),
    ("selector", "scorer"),
)
Run = Mapping[str, Any]


def main() -> None:
    """Runs what is missing, and writes the tables and the plot of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", nargs="+", default=["qwen05_small"])
    parser.add_argument("--instances", nargs="+", type=int, default=[16, 64, 0], help="per fold; 0: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--start", default="builtin", help="scorer that finetuning starts from")
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/adaptation"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/adaptation.svg")
    arguments = parser.parse_args()
    finished = arguments.results / "adaptation"
    finished.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in arguments.pools:
            for count in arguments.instances:
                path = finished / f"{pool_name(name)}-{count}-{start_name(arguments.start)}-{seed}.json"
                if not path.exists():
                    print(path.stem, flush=True)
                    run = measure(name, count, seed, arguments.start, arguments.work)
                    path.write_text(json.dumps(run) + "\n")
                    means = (f"{key} {100 * np.mean(labels):.1f}" for key, labels in run["picks"].items())
                    print(f"  {', '.join(means)}", flush=True)
    runs = [json.loads(path.read_text()) for path in sorted(finished.glob("*.json"))]
    tables = {name: table([run for run in runs if run["pool"] == name]) for name in sorted({r["pool"] for r in runs})}
    result = {"benchmark": "adaptation", "folds": FOLDS, "tables": tables}
    (arguments.results / "adaptation.json").write_text(json.dumps(result, indent=1) + "\n")
    arguments.plot.write_bytes(plot(tables))
    print(json.dumps(tables, indent=1))


def pool_name(name: str) -> str:
    """The name of a pool: that of its file, without endings."""
    return Path(name).name.split(".")[0]


def measure(name: str, count: int, seed: int, start: str, work: Path) -> dict[str, Any]:
    """One run: the label of every selector's pick for each instance, and the curves by number of candidates."""
    source = Path(name) if Path(name).suffix else CANDIDATES / f"{name}.jsonl.gz"
    pool_folder = work / pool_name(name)
    annotated = annotate(source, SETS.get(pool_name(name), ()), 0, pool_folder)
    folder = pool_folder / f"{count}-{start_name(start)}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    splits, _ = evaluate_folds(
        CrossFitting(folds=FOLDS, seed=seed, metric="rougeL", with_probes=False, work=folder / "work"),
        list(read(annotated)),
        ("finetuning", {"scorer": start, "seed": seed}),
        folder,
        load=lambda path: Scorer.load(path, precision="fp32"),
        progress=progress,
        train=train_on(count, seed),
        others={"initial": Scorer.load(start, precision="fp32").score},
    )
    report = build_report(splits, metric="rougeL", split="cross-fitted", seed=seed, folds=FOLDS)
    picks = {
        key: [
            round(float(pool.labels.mean()) if key == "random" else pick_label(value, pool.labels), 4)
            for split in splits
            for pool, value in zip(split.pools, split.selection.values[key], strict=True)
        ]
        for key in ROWS
        if key in report.selectors and not (count and key == "selector")
    }
    return {
        "pool": pool_name(name),
        "train_instances": count,
        "seed": seed,
        "start": start_name(start),
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started),
        "rules": [split.selector.rules[-1].text for split in splits],
        "instances": [pool.instance.instance_id for split in splits for pool in split.pools],
        "picks": picks,
        "curve": {key: [asdict(point) for point in report.curve[key]] for key in ROWS if key in report.curve},
    }


def train_on(count: int, seed: int) -> Callable[[str, Mapping[str, object], Progress], None]:
    """A function that finetunes a fold's scorer on `count` of its training instances; on all if it is 0."""

    def train(step: str, settings: Mapping[str, object], progress: Progress) -> None:
        source, target = Path(str(settings["source"])), Path(str(settings["target"]))
        if count:
            source, _ = take_instances(source, count, target.with_name(f"{target.name}-instances"), 10**9, seed)
        finetuning(build(FinetuningConfig, {**settings, "source": source}), progress)

    return train


def table(runs: Sequence[Run]) -> dict[str, Any]:
    """Number of training instances -> means and paired differences over the seeds, and the first seed's curves."""
    result = {}
    for count in sorted({run["train_instances"] for run in runs}, key=lambda count: count or 10**9):
        of_count = [run for run in runs if run["train_instances"] == count]
        names = [name for name in ROWS if all(name in run["picks"] for run in of_count)]
        picks = {name: np.array([label for run in of_count for label in run["picks"][name]]) for name in names}
        groups = [instance for run in of_count for instance in run["instances"]]
        means = estimate_means(np.stack(list(picks.values()), axis=1), groups)
        result[str(count or "all")] = {
            "instances": len(of_count[0]["instances"]),
            "seeds": [run["seed"] for run in of_count],
            "dates": sorted({run["date"] for run in of_count}),
            "machines": sorted({f"{run['machine']}, {run['threads']} threads" for run in of_count}),
            "seconds": [run["seconds"] for run in of_count],
            "means": {name: times_100(mean) for name, mean in zip(names, means, strict=True)},
            "comparisons": {
                f"{first}-{second}": times_100(compare(picks[first], picks[second], groups))
                for first, second in COMPARISONS
                if {first, second} <= {*names}
            },
            "curve": {
                name: [{key: 100 * value for key, value in point.items()} for point in points]
                for name, points in of_count[0]["curve"].items()
            },
        }
    return result


def plot(tables: Mapping[str, Mapping[str, Any]]) -> bytes:
    """For each pool, a row with Rouge-L by number of candidates and by number of training instances, as SVG."""
    with draw_figure(9.6, 3.6 * len(tables)) as figure:
        for row, (name, by_count) in enumerate(tables.items()):
            left = plain_axes(figure, "candidates sampled (n)", f"{name}: Rouge-L ×100", (len(tables), 2, 2 * row + 1))
            draw_curves(left, list(by_count.values())[-1])
            right = plain_axes(figure, "training instances", "", (len(tables), 2, 2 * row + 2))
            right.sharey(left)
            draw_growth(right, by_count)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK)
        return to_svg_file(figure, salt="adaptation")


def draw_curves(axes: Axes, of_all: Run) -> None:
    """One line by number of candidates for each selector; a level one for the greedy response, a single candidate."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, points in of_all["curve"].items():
        style = {"oracle": (0, (5, 3)), "random": (0, (1, 2))}.get(name, "solid")
        values = [point["mean"] for point in points]
        if name == "random":
            axes.axhline(values[0], color=colour(name), linestyle=style, linewidth=1.4, label=label(name))
        else:
            numbers = range(1, len(values) + 1)
            axes.plot(numbers, values, color=colour(name), linestyle=style, marker="o", markersize=3, label=label(name))
    if "greedy" in of_all["means"]:
        greedy = of_all["means"]["greedy"]["mean"]
        axes.axhline(greedy, color=INK, linestyle=(0, (3, 1, 1, 1)), linewidth=1.2, label=label("greedy"))


def draw_growth(axes: Axes, by_count: Mapping[str, Run]) -> None:
    """The score with its interval by number of training instances; none is the scorer before adaptation."""
    counts = list(by_count)
    before = by_count[counts[-1]]["means"]["initial"]
    axes.set_xticks(range(len(counts) + 1), ["none", *counts])
    estimates = [before, *(by_count[count]["means"]["scorer"] for count in counts)]
    means = [each["mean"] for each in estimates]
    errors = [[abs(each[end] - each["mean"]) for each in estimates] for end in ("low", "high")]
    axes.errorbar(
        range(len(estimates)), means, yerr=errors, color=colour("scorer"), marker="o", markersize=4, capsize=3
    )
    for name in ("mbr", "greedy", "oracle"):
        mean = by_count[counts[-1]]["means"].get(name)
        if mean is not None:
            style = {"oracle": (0, (5, 3)), "greedy": (0, (3, 1, 1, 1))}.get(name, "solid")
            axes.axhline(mean["mean"], color=INK if name == "greedy" else colour(name), linestyle=style, linewidth=1.2)


def colour(name: str) -> str:
    return COLOURS.get(name, DEFAULT_COLOUR)


def label(name: str) -> str:
    return {"initial": "score before adaptation", "scorer": "score after"}.get(name, title(name))


if __name__ == "__main__":
    main()
