"""The nine step verbs: flags from the config class, the step's own `run`, one line at the end."""

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperCommand

from cappy.cli import outcome
from cappy.cli.flags import given_values, make_command, new_run_name, parameters
from cappy.config import build, renamed_flags
from cappy.config import flag as as_typed
from cappy.errors import ConfigError
from cappy.progress import Progress, ProgressLine
from cappy.records import Manifest
from cappy.steps import STEP_SPECS, TRAINING_STEPS
from cappy.worker import StepConfig, config_class, runner

if TYPE_CHECKING:
    from cappy.annotation.step import AnnotationConfig

JSON_FLAG = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead of a line.")]

Before = Callable[..., bool]
After = Callable[[Any, bool], None]
"""The config is that of the verb's step."""


Config = TypeVar("Config", bound=StepConfig)


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A flag of one verb alone, that is not a setting of its step.

    `before` gets all values by name, those of texts included, and says whether that was all there is to do: it needs no
    flag of `instead_of`. `after` gets the config when the step is done, and whether a person reads what is printed. A
    flag with a `text` has a value, that text where nothing is said, for the flags in `part_of` to read.
    """

    name: str
    help: str
    before: Before = lambda **values: False
    after: After = lambda config, as_text: None
    instead_of: tuple[str, ...] = ()
    text: str | None = None
    part_of: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """As it is typed."""
        return as_typed(self.name)


def step_command(step: str) -> TyperCommand:
    """The command of a step."""
    return make_step_command(step, STEP_SPECS[step].help, config_class(step), runner(step), EXTRAS.get(step, ()))


def make_step_command(
    step: str,
    text: str,
    settings: type[Config],
    run: Callable[[Config, Progress], Manifest],
    extras: Sequence[Extra] = (),
) -> TyperCommand:
    """A command whose flags are the fields of `settings` and which calls `run` with them."""
    needed = {name: as_typed(name) for extra in extras for name in extra.instead_of}

    def verb(*, context: typer.Context, as_json: bool, **values: object) -> None:
        asked = {extra.name: values.pop(extra.name) for extra in extras}
        wanted = [extra for extra in extras if asked[extra.name] not in (False, None)]
        _refuse_together(wanted)
        texts = {
            extra.name: extra.text if asked[extra.name] is None else asked[extra.name]
            for extra in extras
            if extra.text is not None
        }
        if any(extra.before(as_json=as_json, **{**values, **texts}) for extra in wanted):
            return
        for name, flag in needed.items():
            if values[name] is None:
                raise typer.BadParameter(f"give the folder to {'write' if name == 'target' else 'read'}: {flag} FOLDER")
        started = time.monotonic()
        chosen = given_values(context, values)
        if chosen.get("fresh"):
            chosen["fresh"] = new_run_name()
        config = build(settings, chosen)
        with ProgressLine(f"cappy {step}") as progress:
            manifest = run(config, progress)
        typer.echo(manifest.to_json() if as_json else summary(manifest, config.target, time.monotonic() - started))
        for extra in wanted:
            extra.after(config, not as_json)

    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=JSON_FLAG, default=False)
    asked_for = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    flags = [asked_for, *parameters(settings), *map(_flag, extras), as_json]
    flags = [_optional(flag, extras) if flag.name in needed else flag for flag in flags]
    return make_command(step, text, verb, flags, renamed_flags(settings))


def _refuse_together(wanted: Sequence[Extra]) -> None:
    """BadParameter where two flags each take the step's place, or where no flag reads the value of another."""
    instead = [extra.flag for extra in wanted if extra.instead_of]
    if len(instead) > 1:
        raise typer.BadParameter(f"{instead[0]} and {instead[1]} do not go together; give one of them")
    names = {extra.name for extra in wanted}
    for extra in wanted:
        if extra.part_of and names.isdisjoint(extra.part_of):
            others = " or ".join(map(as_typed, extra.part_of))
            raise typer.BadParameter(f"{extra.flag} is for {others}; leave it out")


def _flag(extra: Extra) -> inspect.Parameter:
    kind = bool if extra.text is None else str | None
    option = typer.Option(
        extra.flag, help=extra.help, show_default="off" if extra.text is None else extra.text or "none"
    )
    default = False if extra.text is None else None
    return inspect.Parameter(
        extra.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option], default=default
    )


def _optional(flag: inspect.Parameter, extras: Sequence[Extra]) -> inspect.Parameter:
    """The flag where others may take its place; a run without any of them is refused."""
    kind, option = get_args(flag.annotation)
    optional = copy(option)
    others = " or ".join(extra.flag for extra in extras if flag.name in extra.instead_of)
    optional.show_default = f"needed, but for {others}"
    return flag.replace(default=None, annotation=Annotated[kind, optional])


def _plan(*, as_json: bool, mixture: str, subsets: Sequence[str], **_: object) -> bool:
    from cappy.preparation.mixtures import load_mixture, select_subsets
    from cappy.preparation.mixtures.plan import to_json, to_text

    if not mixture:
        raise ConfigError("preparation: --plan shows a mixture; give --mixture t0, heldout or bigbench45")
    mixture_plan = select_subsets(load_mixture(mixture), subsets)
    typer.echo((to_json(mixture_plan) if as_json else to_text(mixture_plan, by_template=True)).rstrip())
    return True


def _estimate(*, as_json: bool, target: Path | None, **values: object) -> bool:
    from cappy.sampling.estimate import describe, estimate
    from cappy.sampling.step import SamplingConfig, endpoint_config

    # Nothing is written, so any place does.
    fresh = new_run_name() if values["fresh"] else ""
    config = build(SamplingConfig, {**values, "target": target or "nowhere", "fresh": fresh})
    estimates = estimate(config)
    if not estimates:
        raise ConfigError("sampling: --estimate needs an LLM to ask; name it with --generator")
    text = json.dumps([asdict(one) for one in estimates]) if as_json else describe(estimates, endpoint_config(config))
    typer.echo(text)
    return True


def _report(config: "AnnotationConfig", as_text: bool) -> None:
    from cappy.annotation.report import to_text, write_report

    folder = config.target / "report"
    with ProgressLine("cappy annotation: report") as progress:
        report = write_report(config.target, folder, progress=progress)
    if as_text:
        typer.echo(f"\n{to_text(report)}\n{folder / 'report.html'}")


def _explain_decision(*, as_json: bool, version: Path | None, report: Path | None, **values: object) -> bool:
    """`--dry-run`: the decision and its reasons."""
    from cappy.registry.promotion import dry_run

    if version is None or report is None:
        name = "version" if version is None else "report"
        raise typer.BadParameter(f"give the folder to read: --{name} FOLDER")
    settings = ("margin", "baseline", "guard", "count_attempts", "force", "tracking_uri")
    decision = dry_run(version, report, **{name: values[name] for name in settings})
    if as_json:
        typer.echo(json.dumps(asdict(decision)))
    else:
        word = {"promote": "would promote", "hold": "would hold"}[decision.decision]
        typer.echo("\n".join([f"{word}; nothing was moved", *(f"  {reason}" for reason in decision.reasons)]))
    return True


def _roll_back(*, as_json: bool, name: str, reason: str, tracking_uri: str, **folders: object) -> bool:
    """`--rollback`: the version that loses the alias stays registered, models:/NAME/NUMBER still names it."""
    from cappy.registry import rollback

    _without_folders(folders, "--rollback")
    model = f"models:/{name}"
    move = rollback(name, why=reason, tracking_uri=tracking_uri)
    champion, was = f"{model}/{move.version}" if move.version else "", f"{model}/{move.former}"
    if as_json:
        typer.echo(json.dumps({"champion": champion, "was": was}))
    elif champion:
        typer.echo(f"{model}@champion is {champion} again, it was {was}")
    else:
        typer.echo(f"{model} has no champion now: there was none before {was}, which keeps its number")
    return True


def _show_history(*, as_json: bool, name: str, tracking_uri: str, **folders: object) -> bool:
    """`--history`: a table, the last move last."""
    from cappy.registry import history

    _without_folders(folders, "--history")
    moves = history(name, tracking_uri=tracking_uri)
    if as_json:
        typer.echo(json.dumps([asdict(move) for move in moves]))
    elif not moves:
        typer.echo(f"models:/{name}@champion has never been moved")
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


def _without_folders(values: Mapping[str, object], flag: str) -> None:
    """A folder beside a flag that reads none was meant for something: a version to roll back to, as like as not."""
    for name in ("version", "report", "target"):
        if values[name] is not None:
            raise typer.BadParameter(f"{flag} takes no --{name}, its model is named by --name; leave --{name} out")


EXTRAS: Mapping[str, tuple[Extra, ...]] = {
    "preparation": (
        Extra(
            name="plan",
            help="Print what the mixture holds, template by template; load nothing.",
            before=_plan,
            instead_of=("target",),
        ),
    ),
    "sampling": (
        Extra(
            name="estimate",
            help="Print requests, tokens, minutes and cost of the run; ask nothing, write nothing.",
            before=_estimate,
            instead_of=("target",),
        ),
    ),
    "annotation": (
        Extra(name="data_report", help="Describe the data: tables here, plots in TARGET/report.", after=_report),
    ),
    "promotion": (
        Extra(
            name="dry_run",
            help="Print what the gate would decide now, and why; move and write nothing.",
            before=_explain_decision,
            instead_of=("target",),
        ),
        Extra(
            name="rollback",
            help="Make the champion's predecessor champion again.",
            before=_roll_back,
            instead_of=("version", "report", "target"),
        ),
        Extra(
            name="history",
            help="Print every move of the champion's alias.",
            before=_show_history,
            instead_of=("version", "report", "target"),
        ),
        Extra(
            name="name",
            help="Registered model that is rolled back or whose history is shown.",
            text="cappy",
            part_of=("rollback", "history"),
        ),
        Extra(name="reason", help="Why it is rolled back; kept in the history.", text="", part_of=("rollback",)),
    ),
}


def summary(manifest: Manifest, target: Path, seconds: float) -> str:
    """What was written, where, and how long it took, in one line; of a dry run what it measured."""
    if "trial_updates" in manifest.metrics:
        from cappy.training.meter import describe_trial

        return describe_trial(manifest.metrics)
    if manifest.rows:
        content = f"{manifest.rows:,} instances with {manifest.candidates:,} candidates"
    else:
        content = f"{len(manifest.files)} files"
    lines = outcome.describe_step(manifest, target)
    shown = manifest.metrics if not lines or manifest.step in TRAINING_STEPS else {}
    numbers = ", ".join(
        f"{name} {value:,.6g}" for name, value in shown.items() if name not in ("instances", "candidates")
    )
    line = f"{target}: {content}{numbers and f'; {numbers}'} (manifest {manifest.hash[:12]}, {seconds:.1f} s)"
    return "\n".join([*lines, line, *(f"caution   {text}" for text in outcome.cautions(manifest))])
