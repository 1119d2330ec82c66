"""`cappy pipeline submit`, `status`, `logs`, `cancel`: runs on Kubeflow, on Vertex AI and on this machine."""

import json
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cappy.cli.flags import FreshFlag, JsonFlag, SettingFlag
from cappy.cli.pipeline import RecipeArgument, ShardsFlag, TrackingUriFlag, load, load_recipe, print_preview
from cappy.errors import CappyError, ConfigError, quote

if TYPE_CHECKING:
    from pipelines.clients import PlatformClient, RunState, TaskState
    from pipelines.recipe import Platform, Recipe

POLL_SECONDS = 10.0
_REMEDIES = {"bucket": "give gs://NAME with lower-case letters, digits, -, _ and . in NAME, and no slash at the end"}
"""Flag -> remedy for a value that does not match the pattern in the recipe."""

SubmitPlatformFlag = Annotated[
    Literal["kubeflow", "vertex"], typer.Option(help="Platform to run on.", show_default=False)
]
RunPlatformFlag = Annotated[
    Literal["local", "docker", "kubeflow", "vertex"], typer.Option("--on", help="Platform of the run.")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Id of the run, as printed by run or submit.", show_default=False)
]
PlatformRecipeFlag = Annotated[
    str, typer.Option("--recipe", help="Recipe with the address of the platform.", show_default="none: use the flags")
]
EndpointFlag = Annotated[str, typer.Option(help="Address of Kubeflow Pipelines.", show_default="the recipe's")]
NamespaceFlag = Annotated[
    str, typer.Option(help="Namespace of the runs (kubeflow).", show_default="the recipe's, else kubeflow")
]
ProjectFlag = Annotated[str, typer.Option(help="Google Cloud project (vertex).", show_default="the recipe's")]
RegionFlag = Annotated[str, typer.Option(help="Region (vertex).", show_default="the recipe's, else us-central1")]
BucketFlag = Annotated[str, typer.Option(help="gs:// bucket (vertex).", show_default="the recipe's")]
StepFlag = Annotated[str, typer.Option(help="Step whose log is shown.", show_default="all")]
FollowFlag = Annotated[bool, typer.Option("--follow", help="Continue until the run ends.")]


def submit(
    recipe: RecipeArgument,
    on: SubmitPlatformFlag,
    setting: SettingFlag = [],  # noqa: B006 (typer needs the default and copies it)
    fresh: FreshFlag = False,
    shards: ShardsFlag = None,
    tracking_uri: TrackingUriFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
    compiled: Annotated[
        Path | None,
        typer.Option(
            help="YAML file from `cappy pipeline compile` to submit unchanged.", show_default="none: compile now"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print graph, resources and maximum cost; submit nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Submit a pipeline to Kubeflow or Vertex AI, and print the run's id and the address of its page."""
    chosen = load_recipe(recipe, setting, shards=shards, tracking_uri=tracking_uri, fresh=fresh)
    chosen = override_platforms(
        chosen, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket
    )
    if dry_run:
        if compiled is not None:
            load("pipelines.builder").load_package(chosen, on, {}, compiled)
        print_preview(chosen, on, as_json)
        return
    submission = load("pipelines.planning").submission_of(chosen, on)
    text = load("pipelines.builder").load_package(chosen, on, submission.arguments, compiled)
    client = _client(chosen, on)
    name = f"cappy-{chosen.pipeline.replace('_', '-')}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        path.write_text(text, encoding="utf-8")
        state = client.submit(path, submission.arguments, name)
    _attach(chosen, on, state, text)
    if as_json:
        typer.echo(json.dumps({"run": state.run, "url": state.url, "name": name}, indent=1))
        return
    address_flags = {
        "endpoint": endpoint,
        "namespace": namespace,
        "project": project,
        "region": region,
        "bucket": bucket,
    }
    flags = [f"--recipe {recipe}"] if Path(recipe).is_file() else []
    flags += [f"--{flag} {value}" for flag, value in address_flags.items() if value]
    follow = " ".join(["cappy pipeline status", state.run, f"--on {on}", *flags, "--follow"])
    for image in load("pipelines.customize").unpinned_images(chosen):
        remedy = "give it by digest (name@sha256:...) under images:, or change revision: whenever you rebuild it"
        typer.echo(
            f"cappy pipeline: {image}: is a tag, so steps of a rebuilt image may come from the cache; {remedy}",
            err=True,
        )
    typer.echo(f"run     {state.run}\npage    {state.url}\nfollow  {follow}")


def status(
    run: RunArgument,
    on: RunPlatformFlag = "local",
    recipe: PlatformRecipeFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
    follow: FollowFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the state of every step of a run; exits with 1 if the run failed."""
    client = connect(on, recipe, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket)
    shown_states: dict[str, str] = {}
    while True:
        state = client.get_state(run)
        if follow and not as_json:
            _print_changes(state, shown_states)
        if state.is_final or not follow:
            break
        time.sleep(POLL_SECONDS)
    if as_json:
        typer.echo(json.dumps(asdict(state), indent=1, default=dict))
    elif not follow:
        typer.echo(table(state))
    if state.state in ("failed", "cancelled"):
        failed = next((task for task in state.tasks if task.state == "failed"), None)
        reason = (failed.error if failed else "") or state.error or f"see {state.url}"
        raise CappyError(f"{run}: {state.state}{f' in {failed.step}' if failed else ''}: {' '.join(reason.split())}")


def logs(
    run: RunArgument,
    on: RunPlatformFlag = "local",
    step: StepFlag = "",
    recipe: PlatformRecipeFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
    follow: FollowFlag = False,
) -> None:
    """Show the log of a run; every line starts with its step."""
    client = connect(on, recipe, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket)
    num_shown: dict[str, int] = {}
    while True:
        ended = not follow or client.get_state(run).is_final
        num_lines: dict[str, int] = {}
        for source, line in client.logs(run, step):
            num_lines[source] = num_lines.get(source, 0) + 1
            if num_lines[source] > num_shown.get(source, 0):
                typer.echo(line)
        num_shown |= {name: max(count, num_shown.get(name, 0)) for name, count in num_lines.items()}
        if ended:
            return
        time.sleep(POLL_SECONDS)


def cancel(
    run: RunArgument,
    on: RunPlatformFlag = "local",
    recipe: PlatformRecipeFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
) -> None:
    """Cancel a run; finished work stays in the work folder."""
    client = connect(on, recipe, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket)
    client.cancel(run)
    typer.echo(f"{run}: cancellation requested")


def add_commands(app: typer.Typer) -> None:
    """Adds these verbs to `cappy pipeline`."""
    for verb in (submit, status, logs, cancel):
        app.command()(verb)


def connect(on: "Platform", recipe: str, **flags: str) -> "PlatformClient":
    """The client of the platform whose address is in a recipe or in flags."""
    return _client(override_platforms(load_recipe(recipe or "adapt"), **flags), on)


def override_platforms(recipe: "Recipe", **flags: str) -> "Recipe":
    """The recipe with its platform settings replaced by the flags that are not empty."""
    import pydantic

    kubeflow, vertex = recipe.kubeflow, recipe.vertex
    try:
        kubeflow = replace(
            kubeflow,
            endpoint=flags["endpoint"] or kubeflow.endpoint,
            namespace=flags["namespace"] or kubeflow.namespace,
        )
        vertex = replace(
            vertex,
            project=flags["project"] or vertex.project,
            region=flags["region"] or vertex.region,
            bucket=flags["bucket"] or vertex.bucket,
        )
        return replace(recipe, kubeflow=kubeflow, vertex=vertex)
    except pydantic.ValidationError as error:
        flag = str(error.errors()[0]["loc"][0])
        remedy = _REMEDIES.get(flag, "see --help")
        raise ConfigError(f"--{flag}: {quote(flags[flag])} is not valid; {remedy}") from error


def table(state: "RunState") -> str:
    """The state of a run as text for a terminal."""
    width = max((len(task.step) for task in state.tasks), default=0)
    rows = [f"  {task.step.ljust(width)}  {_describe_task(task)}" for task in state.tasks]
    return "\n".join([f"{state.run}: {state.state}", *rows, state.url])


def _print_changes(state: "RunState", shown_states: dict[str, str]) -> None:
    """Prints the steps whose state has changed."""
    for step in dict.fromkeys(task.step for task in state.tasks):
        text = _describe_tasks([task for task in state.tasks if task.step == step])
        if shown_states.get(step) != text:
            shown_states[step] = text
            typer.echo(f"{step}: {text}")


def _describe_tasks(tasks: "Sequence[TaskState]") -> str:
    """The state of a step as text; for shards, which have the same name, the number in each state."""
    if len(tasks) == 1:
        return _describe_task(tasks[0])
    counts = sorted(Counter(task.state for task in tasks).items())
    errors = sorted({task.error for task in tasks if task.error})
    return ", ".join(f"{count} {state}" for state, count in counts) + "".join(f": {error}" for error in errors)


def _describe_task(task: "TaskState") -> str:
    seconds = f", {task.seconds:.0f} s" if task.seconds else ""
    return f"{task.state}{seconds}{f': {task.error}' if task.error else ''}"


def _client(recipe: "Recipe", on: str) -> "PlatformClient":
    """The client of the platform. Raises ConfigError if its address or its package is missing."""
    client: PlatformClient
    if on == "kubeflow":
        client = load("pipelines.clients.kubeflow").KubeflowClient(recipe.kubeflow)
    elif on == "vertex":
        client = load("pipelines.clients.vertex").VertexClient(recipe.vertex)
    else:
        client = load("pipelines.clients.local").LocalClient()
    return client


def _attach(recipe: "Recipe", on: str, state: "RunState", text: str) -> None:
    """Logs the pipeline to the MLflow run; warns if MLflow cannot be reached from here."""
    from cappy.registry import attach

    try:
        attach(
            {"pipeline.yaml": text},
            run=state.run,
            tracking_uri=load("pipelines.planning").registry_of(recipe, on),
            facts={"platform": on, "page": state.url},
        )
    except CappyError as error:
        typer.echo(f"cappy pipeline: the run is submitted, but its YAML was not logged to MLflow: {error}", err=True)
