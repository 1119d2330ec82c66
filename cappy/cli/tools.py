"""The verbs beside the steps and pipelines: tools, the list of the work folder, and the services.

`cappy serve` and `cappy gateway` take their flags from the config classes in `serving`, which only they import.
"""

import contextlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

import typer
from typer.core import TyperCommand

from cappy.cli.flags import JsonFlag, explicit_values, make_command, parameters
from cappy.config import DEFAULT_WORK, build, renamed_flags
from cappy.errors import ConfigError, FolderError, suggest
from cappy.steps import STEP_SPECS

if TYPE_CHECKING:
    from cappy.records.work import WorkFolder
    from cappy.sampling.store import StoreEntry

DAY_SECONDS = 86_400.0
WorkFlag = Annotated[Path, typer.Option(help="Folder of unfinished and finished work.")]


def threshold(
    report: Annotated[Path, typer.Option(help="Folder of an evaluation.")],
    min_precision: Annotated[float, typer.Option(min=0.0, max=1.0, help="Required share of good picks, 0 to 1.")] = 0.9,
    good: Annotated[float, typer.Option(min=0.0, max=1.0, help="Minimum label of a good pick, 0 to 1.")] = 0.5,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Confidence that the precision is reached.")
    ] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Find the score above which the selector's picks have the required precision.

    The threshold is chosen on the held-out instances, so that the lower confidence bound of the precision is at least
    --min-precision, and tested on the reported instances; a cross-fitted report uses the out-of-fold instances for
    both. Below the threshold, abstain: none of the responses is good enough.
    """
    from cappy.evaluation.threshold import describe_threshold, find_threshold

    result = find_threshold(report, precision=min_precision, good=good, confidence=confidence)
    typer.echo(
        json.dumps(asdict(result) if result else None)
        if as_json
        else describe_threshold(result, precision=min_precision, good=good, confidence=confidence)
    )


def threshold_command() -> TyperCommand:
    """The command, with the old name of a flag."""
    flags = list(inspect.signature(threshold).parameters.values())
    return make_command(
        "threshold", inspect.getdoc(threshold) or "", threshold, flags, {"--precision": "--min-precision"}
    )


def convert(
    source: Annotated[
        str, typer.Option(help="Folder with pytorch_model.bin, config.json and tokenizer, or hub:org/name@revision.")
    ],
    target: Annotated[Path, typer.Option(help="Scorer folder to write.")],
    sha256: Annotated[str, typer.Option(help="The sha256 of pytorch_model.bin; other files are rejected.")],
) -> None:
    """Turn a published PyTorch checkpoint into a scorer folder.

    Reads only tensors and runs none of its code; every weight must match the model. Writes safetensors.
    """
    from cappy.scoring.conversion import convert as convert_checkpoint

    manifest = convert_checkpoint(source, target, sha256=sha256)
    typer.echo(f"{target}: wrote a scorer as safetensors from the verified checkpoint (manifest {manifest.hash[:12]})")


def templates(
    target: Annotated[Path, typer.Option(help="Folder to write; give it to preparation with --templates.")],
    url: Annotated[
        str | None,
        typer.Option(help="Archive (.tar.gz) of the repository, if GitHub is not reachable.", show_default="GitHub"),
    ] = None,
) -> None:
    """Download PromptSource's templates (Apache-2.0) and verify the sha256 of every file."""
    from cappy.preparation.templates import URL, fetch

    count = fetch(target, url=url or URL)
    typer.echo(f"{target}: {count} template files, sha256 verified")


HELP = """Print rows, tokens, GPU-hours, storage and wall-clock time of a pretraining run, step by step.

Speeds are measured. If your hardware was not measured, give an assumed MFU (share of the data sheet's peak FLOP/s;
--mfu, --sampling-mfu); the plan marks it as assumed. docs/scale.md shows the plan of the paper's pretraining.
"""


def plan_command() -> TyperCommand:
    """The command: its flags are the fields of `PlanConfig`."""
    from cappy.costing import PlanConfig

    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=JsonFlag, default=False)
    return make_command("plan", HELP, _print_plan, [*parameters(PlanConfig), as_json], renamed_flags(PlanConfig))


def _print_plan(*, as_json: bool, **values: object) -> None:
    from cappy.costing import DEFAULT_THROUGHPUT_PATH, PlanConfig, read_throughput
    from cappy.costing.plan import make_plan, text, to_values

    config = build(PlanConfig, values)
    plan = make_plan(config, read_throughput(config.throughput or DEFAULT_THROUGHPUT_PATH))
    typer.echo(json.dumps(to_values(plan), indent=1) if as_json else text(plan))


class WorkRow(TypedDict):
    """A row of the list of work; `last_used` is in seconds of `time.time`.

    `settings` and `differs` are set by `cappy explain`, `reason` and `removed` by `cappy clean`.
    """

    path: str
    step: str
    size_bytes: int
    last_used: float
    settings: NotRequired[Mapping[str, object]]
    differs: NotRequired[Sequence[str]]
    reason: NotRequired[str]
    removed: NotRequired[bool]


def explain(
    step: Annotated[str, typer.Argument(help="Step whose work is listed.", show_default=False)],
    work: WorkFlag = DEFAULT_WORK,
    as_json: JsonFlag = False,
) -> None:
    """List the cached results of a step, newest first, and how the key of each differs from the previous one.

    A run continues or reuses work with the same version, settings and inputs; anything else is computed.
    """
    from cappy.records.work import list_work_folders

    if step not in STEP_SPECS:
        raise ConfigError(f"{step}: no such step{suggest(step, STEP_SPECS)}")
    with_keys = [work_folder for work_folder in list_work_folders(work, step) if work_folder.key is not None]
    rows: list[WorkRow] = []
    for index, work_folder in enumerate(with_keys):
        previous = with_keys[index + 1].key if index + 1 < len(with_keys) else None
        differs = work_folder.key.differences(previous) if work_folder.key and previous else []
        settings = dict(work_folder.key.settings) if work_folder.key else {}
        rows.append({**_row(work_folder, step), "settings": settings, "differs": differs})
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    elif not rows:
        typer.echo(f"{work / step}: no work of this step yet")
    else:
        for index, row in enumerate(rows):
            difference = ", ".join(row["differs"]) or ("first run" if index == len(rows) - 1 else "nothing")
            usage = f"{_format_age(row['last_used'])}, {_format_size(row['size_bytes'])}"
            typer.echo(f"{row['path']}  {usage}\n  differs  {difference}")
        typer.echo(f"\nsettings of the newest work\n{json.dumps(rows[0]['settings'], indent=1, ensure_ascii=False)}")


def clean(
    work: WorkFlag = DEFAULT_WORK,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, help="Also list work that was not used for this many days.", show_default="none"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the listed work.", show_default="off")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List work that no run can reuse.

    This is work of earlier versions of a step, and incomplete work folders (without key.json).

    Published outputs, registered versions and the spending record are not touched.
    """
    from cappy.records.work import list_work_folders, remove_work_folder
    from cappy.sampling import store

    limit = None if older_than is None else time.time() - older_than * DAY_SECONDS
    rows: list[WorkRow] = []
    removals: list[Callable[[], None]] = []
    fresh_names: set[str] = set()
    for work_folder in list_work_folders(work):
        if work_folder.key is not None:
            fresh_names.add(work_folder.key.fresh)
        if reason := work_folder.not_reusable_reason or _idle_reason(work_folder.last_used, limit):
            rows.append({**_row(work_folder, work_folder.step), "reason": reason, "removed": False})
            removals.append(partial(remove_work_folder, work_folder))
    for entry in store.list_entries(work):
        if reason := store.not_reusable_reason(entry, fresh_names) or _idle_reason(entry.last_used, limit):
            rows.append({**_row(entry, entry.kind), "reason": reason, "removed": False})
            removals.append(partial(store.remove_entry, entry))
    errors = _remove(rows, removals) if remove else []
    typer.echo(json.dumps(rows, indent=1) if as_json else _format_rows(work, rows, removed=remove))
    if errors:
        raise FolderError(
            f"{len(errors)} of {len(rows)} pieces of work are in use and were kept, the first: {errors[0]}"
        )


def _remove(rows: Sequence[WorkRow], removals: Sequence[Callable[[], None]]) -> list[str]:
    """Removes the work of each row and marks the row; returns the errors of work that is in use."""
    errors = []
    for row, remove in zip(rows, removals, strict=True):
        try:
            remove()
            row["removed"] = True
        except FolderError as error:
            errors.append(str(error))
    return errors


def _idle_reason(last_used: float, limit: float | None) -> str:
    return f"last used {_format_age(last_used)}" if limit is not None and last_used <= limit else ""


def _row(entry: "WorkFolder | StoreEntry", step: str) -> WorkRow:
    return {"path": str(entry.path), "step": step, "size_bytes": entry.size_bytes, "last_used": entry.last_used}


def _format_rows(work: Path, rows: Sequence[WorkRow], *, removed: bool) -> str:
    if not rows:
        return f"{work}: nothing to remove"
    lines = [f"{row['path']}  {_format_size(row['size_bytes'])}: {row['reason']}" for row in rows]
    counted = [row for row in rows if row["removed"] or not removed]
    total = f"{len(counted)} in total, {_format_size(sum(row['size_bytes'] for row in counted))}"
    return "\n".join([*lines, f"{total}{': removed' if removed else '; --remove removes them'}"])


def _format_age(last_used: float) -> str:
    from cappy.progress import duration

    days = (time.time() - last_used) / DAY_SECONDS
    return f"{days:,.0f} days ago" if days >= 2 else f"{duration(max(0.0, days * DAY_SECONDS))} ago"


def _format_size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


SERVE_HELP = """Serve a scorer over HTTP: POST /score {"pairs": [[instruction, response], ...]}, GET /health,
GET /ready.

Loads and verifies the scorer, then listens until SIGTERM (status 0) or Ctrl-C (status 130). On Vertex AI,
AIP_STORAGE_URI and AIP_HTTP_PORT apply if no flag is given; AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE set the paths.
"""
GATEWAY_HELP = """OpenAI-compatible proxy that samples several responses from an LLM and returns the best. Point your
client's base URL at it; POST /v1/chat/completions works as before.

Listens until SIGTERM (status 0) or Ctrl-C (status 130). docs/guides/gateway.md describes how it handles each
parameter.
"""
SERVICE_PACKAGES = ("fastapi", "uvicorn", "starlette", "prometheus_client")


def service_command(verb: str) -> TyperCommand:
    """The command `cappy serve` or `cappy gateway`: one flag per field of its config class."""
    return _serve_command() if verb == "serve" else _gateway_command()


def _serve_command() -> TyperCommand:
    from serving.config import ServeConfig, read_environment

    def serve(flags: Mapping[str, Any]) -> None:
        environment = read_environment(os.environ)
        if flags.get("scorer") == "":  # A Kubernetes manifest may pass an unset variable.
            flags = {name: value for name, value in flags.items() if name != "scorer"}
        config = build(ServeConfig, {**environment.settings, **flags})
        with _require_extra():
            from serving.server import run
        run(config, environment)

    return _service_command("serve", SERVE_HELP, ServeConfig, serve)


def _gateway_command() -> TyperCommand:
    from serving.config import hosts_from_environment
    from serving.gateway.config import GatewayConfig

    def gateway(flags: Mapping[str, Any]) -> None:
        config = build(GatewayConfig, {"allowed_hosts": hosts_from_environment(os.environ), **flags})
        with _require_extra():
            from serving.gateway.server import run
        run(config)

    return _service_command("gateway", GATEWAY_HELP, GatewayConfig, gateway)


@contextlib.contextmanager
def _require_extra() -> Iterator[None]:
    """ConfigError that names the extra if one of its packages is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in SERVICE_PACKAGES:
            raise
        raise ConfigError(
            f"{error.name} is not installed; install the serve extra: pip install -e '.[serve]'"
        ) from error


def _service_command(
    name: str, text: str, config_class: type[Any], run: Callable[[Mapping[str, Any]], None]
) -> TyperCommand:
    def verb(*, context: typer.Context, **values: Any) -> None:
        run(explicit_values(context, values))

    context_parameter = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    return make_command(name, text, verb, [context_parameter, *parameters(config_class)], renamed_flags(config_class))
