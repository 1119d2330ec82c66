"""`cappy serve`: starts the HTTP service, which only this verb imports."""

from typing import Annotated

import typer

from cappy.errors import ConfigError

EXTRA = "pip install -e '.[serve]'"


def serve(
    scorer: Annotated[
        str,
        typer.Option(
            help="Scorer: models:/name@alias, models:/name/version, builtin, a folder or hub:org/name@revision."
        ),
    ] = "models:/cappy@champion",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes any free one.")] = 8080,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, help="Largest request body in megabytes; larger ones get status 413.")
    ] = 8.0,
    max_pairs: Annotated[int, typer.Option(min=1, help="Most pairs in a request; more get status 413.")] = 1024,
) -> None:
    """Serve a scorer over HTTP: POST /score {"pairs": [[instruction, response], ...]}, GET /health, GET /ready.

    Loads and verifies the scorer, then listens until SIGTERM (status 0) or Ctrl-C (status 130).
    """
    try:
        import serving
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise ConfigError(f"{error.name} is not installed; install the serve extra: {EXTRA}") from error
    serving.run(scorer, host=host, port=port, max_body_bytes=round(max_body_mb * 1e6), max_pairs=max_pairs)
