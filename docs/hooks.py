"""MkDocs hooks: put SVG pictures inline, so that they use the colours of the page."""

import re
from pathlib import Path
from typing import Any

PICTURE = re.compile(r"!\[([^\]]*)\]\((?:\.\./)*(images/[\w-]+\.svg)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replaces links to SVG pictures with inline SVG, which follows the page's dark and light mode.

    Elsewhere, for example on a code host, the link shows the file, which follows the system's setting.
    """
    folder = Path(config["docs_dir"])
    return PICTURE.sub(lambda match: inline_picture(folder / match[2], match[1]), markdown)


def inline_picture(path: Path, description: str) -> str:
    """The picture as an HTML block, without blank lines, which would end the block."""
    lines = path.read_text(encoding="utf-8").splitlines()
    drawing = "\n".join(line for line in lines if line.strip())
    return f'<figure class="picture" aria-label="{description}">\n{drawing}\n</figure>'
