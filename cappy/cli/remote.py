"""`cappy pipeline submit`, `status`, `logs`, `cancel`: runs on Kubeflow and Vertex AI, and of this machine."""

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
from cappy.cli.pipeline import AddressFlag, RecipeArgument, ShardsFlag, load, print_preview, recipe_of
from cappy.errors import CappyError, ConfigError, quote

if TYPE_CHECKING:
    from pipelines.clients import Client, RunState, TaskState
    from pipelines.recipe import Platform, Recipe

LOOK_SECONDS = 10.0
RULES = {"bucket": "give gs://NAME, a name of small letters, digits, - _ and ., without a slash at its end"}
"""What a flag must look like, where the recipe has a pattern for it."""

OnFlag = Annotated[Literal["kubeflow", "vertex"], typer.Option(help="Where the run is to be.", show_default=False)]
WhereFlag = Annotated[Literal["local", "docker", "kubeflow", "vertex"], typer.Option("--on", help="Where the run is.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="The run's id, as submit printed it.", show_default=False)
]
FromFlag = Annotated[
    str, typer.Option("--recipe", help="Recipe that says where the platform is.", show_default="none: the flags say it")
]
EndpointFlag = Annotated[str, typer.Option(help="Address of Kubeflow Pipelines.", show_default="the recipe's")]
NamespaceFlag = Annotated[
    str, typer.Option(help="Namespace of the runs (kubeflow).", show_default="the recipe's, else kubeflow")
]
ProjectFlag = Annotated[str, typer.Option(help="Google Cloud project (vertex).", show_default="the recipe's")]
RegionFlag = Annotated[str, typer.Option(help="Region (vertex).", show_default="the recipe's, else us-central1")]
BucketFlag = Annotated[str, typer.Option(help="gs:// bucket (vertex).", show_default="the recipe's")]
StepFlag = Annotated[str, typer.Option(help="Step whose lines are shown.", show_default="all")]
FollowFlag = Annotated[bool, typer.Option("--follow", help="Go on until the run is over.")]


def submit(
    recipe: RecipeArgument,
    on: OnFlag,
    setting: SettingFlag = [],  # noqa: B006 (typer needs the default and copies it)
    fresh: FreshFlag = False,
    shards: ShardsFlag = None,
    tracking_uri: AddressFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
    compiled: Annotated[
        Path | None,
        typer.Option(
            help="YAML that `cappy pipeline compile` wrote, to send as it is.", show_default="none: compiled now"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print graph, resources and most cost; send nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Send a pipeline to Kubeflow or Vertex AI; prints the run's id and the page to watch it on."""
    chosen = recipe_of(recipe, setting, shards=shards, tracking_uri=tracking_uri, fresh=fresh)
    chosen = with_place(chosen, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket)
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
    given = {"endpoint": endpoint, "namespace": namespace, "project": project, "region": region, "bucket": bucket}
    words = [f"--recipe {recipe}"] if Path(recipe).is_file() else []
    words += [f"--{flag} {value}" for flag, value in given.items() if value]
    follow = " ".join(["cappy pipeline status", state.run, f"--on {on}", *words, "--follow"])
    for image in load("pipelines.customize").unpinned_images(chosen):
        remedy = "give it by digest (name@sha256:...) under images:, or change revision: with it"
        typer.echo(f"cappy pipeline: {image}: is a tag; built anew, its steps come from the cache; {remedy}", err=True)
    typer.echo(f"run     {state.run}\npage    {state.url}\nfollow  {follow}")


def status(
    run: RunArgument,
    on: WhereFlag = "local",
    recipe: FromFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
    follow: FollowFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show how far a run is, step by step; exits with 1 if it failed."""
    client = connect(on, recipe, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket)
    shown_states: dict[str, str] = {}
    while True:
        state = client.get_state(run)
        if follow and not as_json:
            _changes(state, shown_states)
        if state.is_final or not follow:
            break
        time.sleep(LOOK_SECONDS)
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
    on: WhereFlag = "local",
    step: StepFlag = "",
    recipe: FromFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
    follow: FollowFlag = False,
) -> None:
    """Show what the steps of a run wrote, each line with its step."""
    client = connect(on, recipe, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket)
    seen: dict[str, int] = {}
    while True:
        over = not follow or client.get_state(run).is_final
        counted: dict[str, int] = {}
        for source, line in client.logs(run, step):
            counted[source] = counted.get(source, 0) + 1
            if counted[source] > seen.get(source, 0):
                typer.echo(line)
        seen = {name: max(seen.get(name, 0), counted.get(name, 0)) for name in {*seen, *counted}}
        if over:
            return
        time.sleep(LOOK_SECONDS)


def cancel(
    run: RunArgument,
    on: WhereFlag = "local",
    recipe: FromFlag = "",
    endpoint: EndpointFlag = "",
    namespace: NamespaceFlag = "",
    project: ProjectFlag = "",
    region: RegionFlag = "",
    bucket: BucketFlag = "",
) -> None:
    """End a run; what its steps finished stays in the work folder."""
    client = connect(on, recipe, endpoint=endpoint, namespace=namespace, project=project, region=region, bucket=bucket)
    client.cancel(run)
    typer.echo(f"{run}: asked to end")


def add_to(app: typer.Typer) -> None:
    """Makes the verbs those of `cappy pipeline`."""
    for verb in (submit, status, logs, cancel):
        app.command()(verb)


def connect(on: "Platform", recipe: str, **given: str) -> "Client":
    """The client of the platform that a recipe, or flags alone, say where to find."""
    return _client(with_place(recipe_of(recipe or "adapt"), **given), on)


def with_place(recipe: "Recipe", **given: str) -> "Recipe":
    """The recipe with what flags say of the platforms in place of its own."""
    import pydantic

    kubeflow, vertex = recipe.kubeflow, recipe.vertex
    try:
        kubeflow = replace(
            kubeflow,
            endpoint=given["endpoint"] or kubeflow.endpoint,
            namespace=given["namespace"] or kubeflow.namespace,
        )
        vertex = replace(
            vertex,
            project=given["project"] or vertex.project,
            region=given["region"] or vertex.region,
            bucket=given["bucket"] or vertex.bucket,
        )
        return replace(recipe, kubeflow=kubeflow, vertex=vertex)
    except pydantic.ValidationError as error:
        flag = str(error.errors()[0]["loc"][0])
        rule = RULES.get(flag, "look at its help")
        raise ConfigError(f"--{flag}: {quote(given[flag])} will not do; {rule}") from error


def table(state: "RunState") -> str:
    """A run's state, for a terminal."""
    width = max((len(task.step) for task in state.tasks), default=0)
    rows = [f"  {task.step.ljust(width)}  {_describe_task(task)}" for task in state.tasks]
    return "\n".join([f"{state.run}: {state.state}", *rows, state.url])


def _changes(state: "RunState", shown_states: dict[str, str]) -> None:
    """Prints what is new since the last look."""
    for step in dict.fromkeys(task.step for task in state.tasks):
        words = _together([task for task in state.tasks if task.step == step])
        if shown_states.get(step) != words:
            shown_states[step] = words
            typer.echo(f"{step}: {words}")


def _together(tasks: "Sequence[TaskState]") -> str:
    """A step in words: of shards, which a platform tells under one name in any order, how many are in which state."""
    if len(tasks) == 1:
        return _describe_task(tasks[0])
    counts = sorted(Counter(task.state for task in tasks).items())
    errors = sorted({task.error for task in tasks if task.error})
    return ", ".join(f"{count} {state}" for state, count in counts) + "".join(f": {error}" for error in errors)


def _describe_task(task: "TaskState") -> str:
    seconds = f", {task.seconds:.0f} s" if task.seconds else ""
    return f"{task.state}{seconds}{f': {task.error}' if task.error else ''}"


def _client(recipe: "Recipe", on: str) -> "Client":
    """The client of the platform; ConfigError where its address or its package is missing."""
    client: Client
    if on == "kubeflow":
        client = load("pipelines.clients.kubeflow").KubeflowClient(recipe.kubeflow)
    elif on == "vertex":
        client = load("pipelines.clients.vertex").VertexClient(recipe.vertex)
    else:
        client = load("pipelines.clients.local").LocalClient()
    return client


def _attach(recipe: "Recipe", on: str, state: "RunState", text: str) -> None:
    """Keeps the pipeline with the MLflow run; the run itself goes on where MLflow cannot be had from here."""
    from cappy.registry import attach

    try:
        attach(
            {"pipeline.yaml": text},
            run=state.run,
            tracking_uri=load("pipelines.planning").registry_of(recipe, on),
            facts={"platform": on, "page": state.url},
        )
    except CappyError as error:
        typer.echo(f"cappy pipeline: the run is on its way, its YAML is not in MLflow: {error}", err=True)
