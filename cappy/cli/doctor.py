"""`cappy doctor`: what this machine has and lacks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cappy.cli.flags import TrackingFlag

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failure": "[red]failure[/]"}


def doctor(
    work: Annotated[Path, typer.Option(help="Folder that work is kept in.")] = Path(".cappy"),
    tracking_uri: TrackingFlag = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Look at packages, processor, GPUs, disk, weights and MLflow; status 0 if the demo can run, else 1."""
    from cappy.doctor import examine, healthy

    findings = examine(work, tracking_uri)
    ok = healthy(findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            text = escape(finding.found) + (f"\n[bold]→ {escape(finding.remedy)}[/]" if finding.remedy else "")
            table.add_row(escape(finding.name), MARKS[finding.status], text)
        Console().print(table)
        typer.echo("the demo can run: make demo" if ok else "the demo cannot run yet; mend the failures above")
    if not ok:
        raise typer.Exit(1)
