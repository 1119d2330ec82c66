"""Puts into docs/scale.md what its commands print today, and the table of the scale check.

    python benchmarks/scale_page.py

A block that begins with `$ cappy plan` holds that command's output; between the two comments `scale check` stands what
`benchmarks/results/scale-check.json` holds. A test runs the same and compares.
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
    """The page with every output made anew."""
    text = COMMAND.sub(lambda found: f"$ {found[1]}\n{output(found[1])}", text)
    return TABLE.sub(lambda _: f"\n{table(json.loads(CHECK.read_text()))}\n", text)


def output(command: str) -> str:
    """What a command line of `cappy` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cappy(shlex.split(command)[1:])
    return printed.getvalue()


def table(result: dict[str, Any]) -> str:
    """Predicted beside measured, step by step, then what was counted."""
    load = " to ".join(f"{one:.0f}" for one in result["load"])
    lines = [
        f"{result['date']}, {result['machine']}, one thread, load average {load}:",
        "",
        "| step | predicted, s | of that to start, s | measured, s of the processor | off | s by the clock |",
        "|---|---|---|---|---|---|",
    ]
    for step, row in result["steps"].items():
        numbers = (row["predicted_seconds"], row["of_it_start"], row["measured_seconds"])
        told = " | ".join(f"{number:,.1f}" for number in numbers)
        lines.append(f"| {step} | {told} | {row['off']:+.0%} | {row['by_the_clock']:,.0f} |")
    lines += ["", "| counted | predicted | found | off |", "|---|---|---|---|"]
    for name, row in result["volumes"].items():
        told = f"{row['predicted']:,.0f} | {row['found']:,.0f} | {row['off']:+.0%}"
        lines.append(f"| {name.replace('_', ' ')} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
