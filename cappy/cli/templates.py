"""`cappy templates`: PromptSource's templates, fetched and checked file by file."""

from pathlib import Path
from typing import Annotated

import typer


def templates(
    target: Annotated[Path, typer.Option(help="Folder to make; --templates of preparation names it.")],
    url: Annotated[
        str | None,
        typer.Option(help="Archive (.tar.gz) of the repository, where GitHub is not at hand.", show_default="GitHub"),
    ] = None,
) -> None:
    """Fetch PromptSource's templates (Apache-2.0) and check the sha256 of every file."""
    from cappy.preparation.templates.fetching import URL, fetch

    count = fetch(target, url=url or URL)
    typer.echo(f"{target}: {count} files of templates, each with its known sha256")
