"""The `cappy` command; modules that only one verb needs are imported when it runs."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import cappy
from cappy.cli import doctor, pipeline, remote, scoring, tools
from cappy.cli.scoring import reserve_stdin
from cappy.errors import CappyError, error_lines
from cappy.redaction import redact_output
from cappy.runs import tune_garbage_collector
from cappy.steps import STEP_SPECS

__all__ = ["main"]

SERVICES = {"serve": "Serve a scorer over HTTP.", "gateway": "Serve the best of several responses of an LLM."}
TOOLS = {"threshold": tools.threshold_command, "plan": tools.plan_command}
RESUMABLE = {*STEP_SPECS, "adapt", "pipeline"}


class CommandGroup(TyperGroup):
    """Resolves the verbs, and turns a CappyError into one line on stderr and an exit status."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command of a verb; commands with a config class are created here, as its import takes half a second."""
        if args and args[0] in STEP_SPECS:
            from cappy.cli.steps import step_command

            return args[0], step_command(args[0]), args[1:]
        if args and args[0] == "adapt":
            from cappy.cli.adapt import adapt_command

            return args[0], adapt_command(), args[1:]
        if args and args[0] in SERVICES:
            return args[0], tools.service_command(args[0]), args[1:]
        if args and args[0] in TOOLS:
            return args[0], TOOLS[args[0]](), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> object:
        """Runs the verb: a CappyError exits with status 1, Ctrl-C with 130; other exceptions keep their traceback."""
        try:
            return super().invoke(ctx)
        except CappyError as error:
            verb = ctx.invoked_subcommand
            for line in error_lines(error):
                typer.echo(f"cappy {verb}: {line.removeprefix(f'{verb}: ')}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            verb = ctx.invoked_subcommand
            remedy = "; run the same command again to continue" if verb in RESUMABLE else ""
            typer.echo(f"{' '.join(filter(None, ('cappy', verb)))}: interrupted{remedy}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=CommandGroup,
    help="Small scorers that improve large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"cappy {cappy.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _placeholder() -> None:
    """Entry in the list of verbs; `CommandGroup.resolve_command` creates the command that runs."""


app.command("adapt", help="Make a scorer for your task: run all steps.")(_placeholder)
for _spec in STEP_SPECS.values():
    # The flags are read from the config class when the verb runs.
    app.command(_spec.name, help=_spec.help)(_placeholder)
app.command("score", short_help="Score responses, JSON Lines in and out.")(scoring.score)
app.command("select", short_help="Pick the best of several responses.")(scoring.select)
for _verb, _help in SERVICES.items():
    app.command(_verb, short_help=_help)(_placeholder)
app.command("threshold", help="Find the score above which picks are good enough.")(_placeholder)
app.command("plan", help="Estimate the time and resources of a pretraining run.")(_placeholder)
app.command("convert", short_help="Turn a published PyTorch checkpoint into a scorer.")(tools.convert)
app.command("templates", short_help="Download PromptSource's templates and verify them.")(tools.templates)
app.command("doctor", short_help="Check what this machine has and what is missing.")(doctor.doctor)
app.command("explain", short_help="List the cached results of a step and why each was recomputed.")(tools.explain)
app.command("clean", short_help="List or remove work that no run can reuse.")(tools.clean)
remote.add_commands(pipeline.app)
app.add_typer(pipeline.app, name="pipeline")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, by default that of this process; raises SystemExit."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # They would overwrite our progress line.
    redact_output()
    tune_garbage_collector()
    with reserve_stdin():
        app(arguments, prog_name="cappy")
