"""The verbs of the steps: flags from the config class, a call of the step's `run`, and a summary line."""

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
from cappy.cli.flags import explicit_values, make_command, new_run_name, parameters
from cappy.config import build, renamed_flags
from cappy.config import flag as flag_name
from cappy.errors import ConfigError
from cappy.progress import Progress, ProgressLine
from cappy.records import Manifest
from cappy.steps import STEP_SPECS, TRAINING_STEPS
from cappy.worker import StepConfig, config_class, runner

if TYPE_CHECKING:
    from cappy.annotation.step import AnnotationConfig

JSON_FLAG = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead of a line.")]

Before = Callable[..., bool]
"""Called with the values of all flags by name; returns whether to skip the step."""
After = Callable[[Any, bool], None]
"""Called with the config of the step and whether the output is text rather than JSON."""

Config = TypeVar("Config", bound=StepConfig)


@dataclass(frozen=True, kw_only=True)
class ExtraFlag:
    """A flag of a single verb that is not a setting of its step.

    `before` runs before the step, and the flags in `instead_of` are not required together with this flag. `after` runs
    after the step. A flag with a `default` takes a value; it is allowed only together with a flag in `used_by`.
    """

    name: str
    help: str
    before: Before = lambda **values: False
    after: After = lambda config, as_text: None
    instead_of: tuple[str, ...] = ()
    default: str | None = None
    used_by: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return flag_name(self.name)


def step_command(step: str) -> TyperCommand:
    """The command of a step."""
    return make_step_command(step, STEP_SPECS[step].help, config_class(step), runner(step), EXTRAS.get(step, ()))


def make_step_command(
    step: str,
    text: str,
    settings: type[Config],
    run: Callable[[Config, Progress], Manifest],
    extras: Sequence[ExtraFlag] = (),
) -> TyperCommand:
    """Makes a command whose flags are the fields of `settings` and the extras, and which calls `run` with a config."""
    optional_flags = {name: flag_name(name) for extra in extras for name in extra.instead_of}

    def verb(*, context: typer.Context, as_json: bool, **values: object) -> None:
        extra_values = {extra.name: values.pop(extra.name) for extra in extras}
        selected = [extra for extra in extras if extra_values[extra.name] not in (False, None)]
        _refuse_conflicts(selected)
        texts = {
            extra.name: extra.default if extra_values[extra.name] is None else extra_values[extra.name]
            for extra in extras
            if extra.default is not None
        }
        if any(extra.before(as_json=as_json, **{**values, **texts}) for extra in selected):
            return
        for name, flag in optional_flags.items():
            if values[name] is None:
                raise typer.BadParameter(f"give the folder to {'write' if name == 'target' else 'read'}: {flag} FOLDER")
        started = time.monotonic()
        chosen = explicit_values(context, values)
        if chosen.get("fresh"):
            chosen["fresh"] = new_run_name()
        config = build(settings, chosen)
        with ProgressLine(f"cappy {step}") as progress:
            manifest = run(config, progress)
        typer.echo(manifest.to_json() if as_json else summary(manifest, config.target, time.monotonic() - started))
        for extra in selected:
            extra.after(config, not as_json)

    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=JSON_FLAG, default=False)
    context_parameter = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    flags = [context_parameter, *parameters(settings), *map(_flag, extras), as_json]
    flags = [_optional(flag, extras) if flag.name in optional_flags else flag for flag in flags]
    return make_command(step, text, verb, flags, renamed_flags(settings))


def _refuse_conflicts(selected: Sequence[ExtraFlag]) -> None:
    """Raises BadParameter if two flags both replace the step, or if no selected flag uses the value of another."""
    replacing = [extra.flag for extra in selected if extra.instead_of]
    if len(replacing) > 1:
        raise typer.BadParameter(f"{replacing[0]} and {replacing[1]} cannot be combined; give one of them")
    names = {extra.name for extra in selected}
    for extra in selected:
        if extra.used_by and names.isdisjoint(extra.used_by):
            others = " or ".join(map(flag_name, extra.used_by))
            raise typer.BadParameter(
                f"{extra.flag} has an effect only with {others}; add it, or leave {extra.flag} out"
            )


def _flag(extra: ExtraFlag) -> inspect.Parameter:
    kind = bool if extra.default is None else str | None
    option = typer.Option(
        extra.flag, help=extra.help, show_default="off" if extra.default is None else extra.default or "none"
    )
    default = False if extra.default is None else None
    return inspect.Parameter(
        extra.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option], default=default
    )


def _optional(flag: inspect.Parameter, extras: Sequence[ExtraFlag]) -> inspect.Parameter:
    """Makes a flag optional, because other flags may replace it; leaving all of them out is an error."""
    kind, option = get_args(flag.annotation)
    optional = copy(option)
    others = " or ".join(extra.flag for extra in extras if flag.name in extra.instead_of)
    optional.show_default = f"required without {others}"
    return flag.replace(default=None, annotation=Annotated[kind, optional])


def _plan(*, as_json: bool, mixture: str, subsets: Sequence[str], **_: object) -> bool:
    from cappy.preparation.mixtures import load_mixture, select_subsets
    from cappy.preparation.mixtures.plan import to_json, to_text

    if not mixture:
        raise ConfigError("preparation: --plan needs a mixture; give --mixture t0, heldout or bigbench45")
    mixture_plan = select_subsets(load_mixture(mixture), subsets)
    typer.echo((to_json(mixture_plan) if as_json else to_text(mixture_plan, by_template=True)).rstrip())
    return True


def _estimate(*, as_json: bool, target: Path | None, **values: object) -> bool:
    from cappy.sampling.estimate import describe, estimate, to_values
    from cappy.sampling.step import SamplingConfig, endpoint_config

    # Nothing is written, so any target works.
    fresh = new_run_name() if values["fresh"] else ""
    config = build(SamplingConfig, {**values, "target": target or "nowhere", "fresh": fresh})
    estimates = estimate(config)
    if not estimates:
        raise ConfigError("sampling: --estimate needs an LLM; give it with --generator")
    text = json.dumps(to_values(estimates)) if as_json else describe(estimates, endpoint_config(config))
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
    """`--dry-run`: prints the decision and its reasons."""
    from cappy.registry.promotion import dry_run

    if version is None or report is None:
        name = "version" if version is None else "report"
        raise typer.BadParameter(f"give the folder to read: --{name} FOLDER")
    settings = ("margin", "baseline", "guard", "count_attempts", "force", "tracking_uri")
    decision = dry_run(version, report, **{name: values[name] for name in settings})
    if as_json:
        typer.echo(json.dumps(asdict(decision)))
    else:
        verdict = {"promote": "would promote", "hold": "would hold"}[decision.decision]
        typer.echo("\n".join([f"{verdict}; nothing was moved", *(f"  {reason}" for reason in decision.reasons)]))
    return True


def _roll_back(*, as_json: bool, name: str, reason: str, tracking_uri: str, **folders: object) -> bool:
    """`--rollback`: moves the champion alias back; the version that loses it stays registered."""
    from cappy.registry import rollback

    _refuse_folders(folders, "--rollback")
    model = f"models:/{name}"
    move = rollback(name, why=reason, tracking_uri=tracking_uri)
    champion, former = f"{model}/{move.version}" if move.version else "", f"{model}/{move.former}"
    if as_json:
        typer.echo(json.dumps({"champion": champion, "was": former}))
    elif champion:
        typer.echo(f"{model}@champion is {champion} again, it was {former}")
    else:
        typer.echo(f"{model} has no champion now: there was none before {former}, which stays registered")
    return True


def _show_history(*, as_json: bool, name: str, tracking_uri: str, **folders: object) -> bool:
    """`--history`: prints the moves as a table, oldest first."""
    from cappy.registry import history

    _refuse_folders(folders, "--history")
    moves = history(name, tracking_uri=tracking_uri)
    if as_json:
        typer.echo(json.dumps([asdict(move) for move in moves]))
    elif not moves:
        typer.echo(f"models:/{name}@champion has never been moved")
    else:
        rows = [("when", "what", "version", "before", "who", "why")]
        rows += [
            (m.at, m.kind, str(m.version or "none"), str(m.former or "none"), m.by, m.why or "not given") for m in moves
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        for row in rows:
            cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
            typer.echo("  ".join([*cells, row[5]]))
    return True


def _refuse_folders(values: Mapping[str, object], flag: str) -> None:
    """Raises BadParameter for a folder, which the flag does not use: it may be meant as the version to roll back to."""
    for name in ("version", "report", "target"):
        if values[name] is not None:
            raise typer.BadParameter(f"{flag} does not use --{name}; name the model with --name and leave --{name} out")


EXTRAS: Mapping[str, tuple[ExtraFlag, ...]] = {
    "preparation": (
        ExtraFlag(
            name="plan",
            help="Print the contents of the mixture by template; load nothing.",
            before=_plan,
            instead_of=("target",),
        ),
    ),
    "sampling": (
        ExtraFlag(
            name="estimate",
            help="Print requests, tokens, minutes and cost of the run; send nothing, write nothing.",
            before=_estimate,
            instead_of=("target",),
        ),
    ),
    "annotation": (
        ExtraFlag(name="data_report", help="Describe the data: tables here, plots in TARGET/report.", after=_report),
    ),
    "promotion": (
        ExtraFlag(
            name="dry_run",
            help="Print the decision of the gate and its reasons; move no alias and write nothing.",
            before=_explain_decision,
            instead_of=("target",),
        ),
        ExtraFlag(
            name="rollback",
            help="Make the previous champion the champion again.",
            before=_roll_back,
            instead_of=("version", "report", "target"),
        ),
        ExtraFlag(
            name="history",
            help="Print every move of the champion alias.",
            before=_show_history,
            instead_of=("version", "report", "target"),
        ),
        ExtraFlag(
            name="name",
            help="Registered model for --rollback and --history.",
            default="cappy",
            used_by=("rollback", "history"),
        ),
        ExtraFlag(
            name="reason", help="Reason for the rollback, recorded in the history.", default="", used_by=("rollback",)
        ),
    ),
}


def summary(manifest: Manifest, target: Path, seconds: float) -> str:
    """The summary of a finished step as text: folder, content, metrics and seconds; for a dry run its measurements."""
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
