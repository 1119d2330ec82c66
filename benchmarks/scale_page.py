"""Updates the command outputs and the table of the scale check in docs/scale.md.

    python benchmarks/scale_page.py

A block that begins with `$ cappy plan` is filled with the command's output, and the part between the two `scale check`
comments with a table of `benchmarks/results/scale-check.json`. A test checks that the page is up to date.
"""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

from cappy.cli import main as cappy

ROOT = Path(__file__).resolve().parents[1]
PAGE, CHECK = ROOT / "docs/scale.md", ROOT / "benchmarks/results/scale-check.json"
COMMAND = re.compile(r"(?<=^```console\n)\$ (cappy plan [^\n]*)\n.*?(?=^```)", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?<=<!-- scale check -->\n).*?(?=<!-- end of scale check -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with updated outputs and table."""
    text = COMMAND.sub(lambda match: f"$ {match[1]}\n{output(match[1])}", text)
    return TABLE.sub(lambda _: f"\n{table(json.loads(CHECK.read_text()))}\n", text)


def output(command: str) -> str:
    """The output of a `cappy` command line."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cappy(shlex.split(command)[1:])
    return printed.getvalue()


def table(result: dict[str, Any]) -> str:
    """Tables of predicted and measured seconds by step, and of predicted and counted volumes."""
    load = " to ".join(f"{one:.0f}" for one in result["load"])
    lines = [
        f"{result['date']}, {result['machine']}, one thread, load average {load}:",
        "",
        "| step | predicted, s | of that start, s | measured, CPU s | error | wall-clock, s |",
        "|---|---|---|---|---|---|",
    ]
    for step, row in result["steps"].items():
        numbers = (row["predicted_seconds"], row["of_it_start"], row["measured_seconds"])
        cells = " | ".join(f"{number:,.1f}" for number in numbers)
        lines.append(f"| {step} | {cells} | {row['off']:+.0%} | {row['by_the_clock']:,.0f} |")
    lines += ["", "| volume | predicted | measured | error |", "|---|---|---|---|"]
    for name, row in result["volumes"].items():
        cells = f"{row['predicted']:,.0f} | {row['found']:,.0f} | {row['off']:+.0%}"
        lines.append(f"| {name.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
