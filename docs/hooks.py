"""What the site does to pages that Markdown alone cannot: a picture takes part in the page's colours."""

import re
from pathlib import Path
from typing import Any

PICTURE = re.compile(r"!\[([^\]]*)\]\((?:\.\./)*(images/[\w-]+\.svg)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Puts our SVG pictures into the page itself, where they follow its switch between dark and light.

    Elsewhere, as on a code host, the same line shows the file, which follows the system's setting.
    """
    folder = Path(config["docs_dir"])
    return PICTURE.sub(lambda found: inline_picture(folder / found[2], found[1]), markdown)


def inline_picture(path: Path, description: str) -> str:
    """The picture as one block of HTML; blank lines would end the block."""
    lines = path.read_text(encoding="utf-8").splitlines()
    drawing = "\n".join(line for line in lines if line.strip())
    return f'<figure class="picture" aria-label="{description}">\n{drawing}\n</figure>'
