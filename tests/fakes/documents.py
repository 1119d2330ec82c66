"""The code blocks of the README and of docs/, each with the reason why it does not run, if it does not."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
RUNS: Mapping[str, tuple[str, ...]] = {"bash": ("bash", "-euo", "pipefail", "-c"), "python": (sys.executable, "-c")}
"""Languages of blocks that run, and by which command."""
REASON = re.compile(r"<!-- not run: (.+) -->")
FENCE = re.compile(r"^( *)```(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it does not run and is empty where it does."""

    place: str
    language: str
    code: str
    reason: str


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order; a reason is an HTML comment on the line before the block."""
    lines: list[str] = []
    before, opened = "", None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            match = REASON.search(before)
            opened, lines = (f"{page.relative_to(ROOT)}:{number}", fence[2].strip(), match[1] if match else ""), []
        elif opened is not None and fence and not fence[2].strip():
            place, language, reason = opened
            yield Block(place, language, "".join(f"{text}\n" for text in lines), reason)
            opened = None
        elif opened is not None:
            lines.append(line)
        before = line
