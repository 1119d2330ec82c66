"""`cappy convert`: a published PyTorch checkpoint becomes a scorer folder, once."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        str, typer.Option(help="Folder with pytorch_model.bin, config.json and tokenizer, or hub:org/name@revision.")
    ],
    target: Annotated[Path, typer.Option(help="Scorer folder to write.")],
    sha256: Annotated[str, typer.Option(help="The sha256 of pytorch_model.bin; a file with another one is not read.")],
) -> None:
    """Turn a published PyTorch checkpoint into a scorer folder.

    The file is read as tensors alone, none of its code runs; every weight must have its place. Out come safetensors.
    """
    from cappy.scoring.conversion import convert as converted

    manifest = converted(source, target, sha256=sha256)
    typer.echo(
        f"{target}: a scorer as safetensors, from the checkpoint with that sha256 (manifest {manifest.hash[:12]})"
    )
