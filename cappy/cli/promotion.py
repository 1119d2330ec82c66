"""What `cappy promotion` does beside promoting: explain, roll back, tell the history."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer


def explain(values: Mapping[str, Any]) -> bool:
    """`--dry-run`: the decision and its reasons."""
    from cappy.registry.promotion import dry_run

    for name in ("version", "report"):
        if values[name] is None:
            raise typer.BadParameter(f"give the folder to read: --{name} FOLDER")
    settings = ("margin", "baseline", "guard", "count_attempts", "force", "tracking_uri")
    decision = dry_run(values["version"], values["report"], **{name: values[name] for name in settings})
    if values["as_json"]:
        typer.echo(json.dumps(asdict(decision)))
    else:
        word = {"promote": "would promote", "hold": "would hold"}[decision.decision]
        typer.echo("\n".join([f"{word}; nothing was moved", *(f"  {reason}" for reason in decision.reasons)]))
    return True


def roll_back(values: Mapping[str, Any]) -> bool:
    """`--rollback`: the version that loses the alias stays registered, models:/NAME/NUMBER still names it."""
    from cappy.registry import rollback

    _without_folders(values, "--rollback")
    model = f"models:/{values['name']}"
    move = rollback(values["name"], why=values["reason"], tracking_uri=values["tracking_uri"])
    champion, was = f"{model}/{move.version}" if move.version else "", f"{model}/{move.former}"
    if values["as_json"]:
        typer.echo(json.dumps({"champion": champion, "was": was}))
    elif champion:
        typer.echo(f"{model}@champion is {champion} again, it was {was}")
    else:
        typer.echo(f"{model} has no champion now: there was none before {was}, which keeps its number")
    return True


def show_history(values: Mapping[str, Any]) -> bool:
    """`--history`: a table, the last move last."""
    from cappy.registry import history

    _without_folders(values, "--history")
    moves = history(values["name"], tracking_uri=values["tracking_uri"])
    if values["as_json"]:
        typer.echo(json.dumps([asdict(move) for move in moves]))
    elif not moves:
        typer.echo(f"models:/{values['name']}@champion has never been moved")
    else:
        rows = [("when", "what", "version", "before", "who", "why")]
        rows += [
            (m.at, m.kind, str(m.version or "none"), str(m.former or "none"), m.by, m.why or "not said") for m in moves
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        for row in rows:
            cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
            typer.echo("  ".join([*cells, row[5]]))
    return True


def _without_folders(values: Mapping[str, Any], flag: str) -> None:
    """A folder beside a flag that reads none was meant for something: a version to roll back to, as like as not."""
    for name in ("version", "report", "target"):
        if values[name] is not None:
            raise typer.BadParameter(f"{flag} takes no --{name}, its model is named by --name; leave --{name} out")
