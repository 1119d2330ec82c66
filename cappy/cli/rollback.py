"""`cappy rollback`: the champion's predecessor is served again."""

from typing import Annotated

import typer

from cappy.cli.adapt import TrackingFlag


def rollback(
    name: Annotated[str, typer.Option(help="Name of the registered model.")] = "cappy",
    tracking_uri: TrackingFlag = "",
) -> None:
    """Give the champion's alias back to the version that had it before.

    The version that loses the alias stays registered: models:/NAME/NUMBER still names it.
    """
    from cappy.registry import champion
    from cappy.registry import rollback as roll_back

    present = champion(name, tracking_uri=tracking_uri)
    former = roll_back(name, tracking_uri=tracking_uri)
    was = f", it was {present.uri}" if present else ""
    typer.echo(f"models:/{name}@champion is {former.uri} again{was}")
