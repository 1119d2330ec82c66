"""Runs a pipeline on this machine with kfp's local runner, and shows the progress of each step.

Steps run in processes or in containers. Containers need a running Docker engine that has the images, and get their keys
from this process's environment.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cappy.config import to_values
from cappy.errors import CappyError, ConfigError, quote
from cappy.files import make_private, remove_folder
from cappy.records.folder import write_bytes
from cappy.redaction import has_secret
from cappy.runs import PARENT_VARIABLE, PROGRESS_VARIABLE
from cappy.worker import ORPHAN_SECONDS, hold_parent_lock
from pipelines.clients.local import STATUS, PipelineSource, Request
from pipelines.customize import image
from pipelines.definitions import TRACKING_TASK
from pipelines.planning import settings_of, work_of
from pipelines.recipe import Platform, Recipe
from pipelines.states import StepState, StepTable, log_section, read_states
from pipelines.submission import Submission, fingerprints, prepare

POLL_SECONDS = 0.2
TAIL_LINES = 15
REWRITTEN_TEXT = "python3"
"""kfp's local runner replaces this text in every argument with the path of the interpreter."""

_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt): ")


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The result of a run: the output folder of each step, the steps taken from the cache, and seconds by step."""

    run_id: str
    folder: Path
    log: Path
    outputs: Mapping[str, Path]
    cached: frozenset[str] = frozenset()
    seconds: Mapping[str, float] = field(default_factory=dict)


def run_recipe(
    recipe: Recipe,
    platform: Platform = "local",
    *,
    root: Path = Path(".cappy"),
    images: Mapping[str, str] | None = None,
    show: bool = True,
) -> RunOutcome:
    """Runs a recipe's pipeline on this machine and waits for it.

    Artifacts go to `root`/pipeline and logs to `root`/runs/RUN; `images` are the image ids by step, for platform
    docker. Raises CappyError with the step's own message if a step fails. Ctrl-C and SIGTERM stop every process of the
    run and raise KeyboardInterrupt.
    """
    work = work_of(recipe, platform)
    recipe, marker = _with_fresh_name(recipe, work)
    submission = prepare(
        recipe.pipeline,
        settings_of(recipe),
        work=work,
        shards=recipe.shards,
        tracking_uri=recipe.tracking_uri,
        revision=recipe.revision,
        images=images,
    )
    request: PipelineSource = {"recipe": to_values(_without_passwords(recipe)), "platform": platform}
    outcome = execute(request, submission, work=work, root=root, show=show)
    if marker is not None:
        marker.unlink(missing_ok=True)
    return outcome


def _with_fresh_name(recipe: Recipe, work: Path) -> tuple[Recipe, Path | None]:
    """A --fresh run has a unique name in its settings, so that earlier work is not reused.

    If one was interrupted, returns the recipe with that name, so that it is resumed; also returns the file that stores
    the name. The caller removes the file when the run has finished. A new fresh run removes kfp's cache of earlier
    runs, so that later runs use the results in the work folder.
    """
    fresh_names = {str(values["fresh"]) for values in recipe.settings.values() if values.get("fresh")}
    if not fresh_names:
        return recipe, None
    without_fresh = {step: {**values, "fresh": ""} for step, values in settings_of(recipe).items()}
    digests = fingerprints(without_fresh, tracking_uri=recipe.tracking_uri, revision=recipe.revision)
    marker = work / "unfinished" / list(digests.values())[-1]
    try:
        name = marker.read_text(encoding="utf-8")
    except FileNotFoundError:
        name = fresh_names.pop()
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(marker, name.encode())
        with contextlib.suppress(FileNotFoundError):
            remove_folder(work / "cache")
    settings = {step: {**recipe.settings.get(step, {}), "fresh": name} for step in recipe.steps}
    return replace(recipe, settings=settings), marker


def _without_passwords(recipe: Recipe) -> Recipe:
    """The recipe without addresses that contain a password; the child has MLflow's address in its environment."""
    settings = {
        step: {name: value for name, value in values.items() if name != "tracking_uri" or not has_secret(str(value))}
        for step, values in recipe.settings.items()
    }
    address = "" if has_secret(recipe.tracking_uri) else recipe.tracking_uri
    return replace(recipe, settings=settings, tracking_uri=address)


def execute(
    pipeline_source: str | PipelineSource, submission: Submission, *, work: Path, root: Path, show: bool = True
) -> RunOutcome:
    """Runs a kfp pipeline with a submission's arguments.

    `pipeline_source` is a recipe with a platform, or `module:name`.
    """
    root, work = root.absolute(), work.absolute()
    _refuse_rewritten_text({"the folder of the run": str(root), **submission.arguments})
    run_id = f"{submission.pipeline}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = root / "runs" / run_id
    make_private(folder)
    request_path = folder / "request.json"
    source_values: PipelineSource = (
        {"pipeline": pipeline_source} if isinstance(pipeline_source, str) else pipeline_source
    )
    request: Request = {
        **source_values,
        "arguments": submission.arguments,
        "process": os.getpid(),
        "work": str(work),
        "run": run_id,
        "pipeline_root": str(root / "pipeline"),
        "cache_root": str(work / "cache"),
        "fingerprints": submission.fingerprints,
    }
    write_bytes(request_path, json.dumps(request, indent=1).encode())

    def observe_steps(alive: bool, succeeded: bool = False) -> list[StepState]:
        return read_states(
            submission.fingerprints, work=work, progress=folder, run=run_id, alive=alive, succeeded=succeeded
        )

    lock = hold_parent_lock(folder / "parent.lock")
    try:
        title, log = f"cappy {submission.pipeline}", folder / "run.log"
        with _interrupt_on_sigterm(), StepTable(title, log, show=show) as table:
            status = _supervise(request_path, submission.tracking_uri, lambda: table.update(observe_steps(alive=True)))
            states = observe_steps(alive=False, succeeded=status == 0)
            (folder / STATUS).write_text(json.dumps({"status": status}))
            table.update(states)
    finally:
        if request.get("platform") == "docker":
            _stop_containers(run_id)  # The engine runs them: no signal to a process group reaches them.
        os.close(lock)
    if status:
        _raise_failure(states, folder / "run.log", show=show)
    return _outcome(run_id, folder, states)


def _supervise(request_path: Path, tracking_uri: str, update_table: Callable[[], None]) -> int:
    """Starts the child and waits for it; returns its exit status. An interrupt stops the child and its steps."""
    folder = request_path.parent
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        # For steps without a tracking_uri setting: evaluation loads the champion from this address.
        **({"MLFLOW_TRACKING_URI": tracking_uri} if tracking_uri else {}),
        PARENT_VARIABLE: str(folder / "parent.lock"),
        PROGRESS_VARIABLE: str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        # So that a file in the current folder cannot shadow a module.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with (folder / "run.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 (our own module)
            [sys.executable, "-m", "pipelines.execution", str(request_path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
            update_table()
    finally:
        _end_group(process)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Sends SIGTERM to the child's process group, and SIGKILL after `ORPHAN_SECONDS`; no-op if the child has ended.

    The child ends at once, but one of its steps may write a checkpoint first.
    """
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + ORPHAN_SECONDS
        while time.monotonic() < deadline:
            process.poll()  # Reaps the child: as a zombie it would stay in the group.
            os.killpg(process.pid, 0)
            time.sleep(POLL_SECONDS / 4)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM act like Ctrl-C in this block, so that the run's processes are stopped and one line says so.

    Scripts should send SIGTERM: shells start background processes with SIGINT ignored. Does nothing if a handler is
    already set, or outside the main thread, where none can be set.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _refuse_rewritten_text(arguments: Mapping[str, object]) -> None:
    for name, value in arguments.items():
        if REWRITTEN_TEXT in json.dumps(value):
            remedy = "choose another name (kfp's local runner rewrites that text in arguments)"
            raise ConfigError(f"{name}: contains the text {REWRITTEN_TEXT!r}, got {quote(value)}; {remedy}")


def _raise_failure(states: list[StepState], log: Path, *, show: bool) -> None:
    """Raises CappyError with the failed step's message; if it has none (a bug), shows the end of its log first."""
    failed = [state for state in states if state.state == "failed"] or [StepState(step=TRACKING_TASK, state="failed")]
    name = failed[0].step.partition(" ")[0]  # Shards log under the name of their step, interleaved.
    prefix = f"cappy {name}: "
    log_lines = [line.strip() for line in log_section(log, "")]
    messages = [line.removeprefix(prefix) for line in log_lines if line.startswith(prefix)]
    failed_step = next((state for state in failed if state.error in messages), failed[0])
    if messages:
        raise CappyError(f"{failed_step.step}: {failed_step.error if failed_step.error in messages else messages[-1]}")
    lines = log_section(log, name)
    if show:
        sys.stderr.write("\n".join(lines[-TAIL_LINES:]) + "\n")
    exception_line = next((line for line in reversed(lines) if _EXCEPTION.match(line)), "")
    reason = failed_step.error or exception_line or "its process was killed (out of memory?)"
    raise CappyError(f"{failed_step.step}: {reason}; the whole log is {log}")


def _outcome(run_id: str, folder: Path, states: list[StepState]) -> RunOutcome:
    return RunOutcome(
        run_id=run_id,
        folder=folder,
        log=folder / "run.log",
        outputs={state.step: state.target for state in states if state.target is not None},
        cached=frozenset(state.step for state in states if state.state == "cached"),
        seconds={state.step: state.seconds for state in states if state.state == "done"},
    )


RUN_LABEL = "cappy.run"
"""The label of a container with the id of its run."""
KEY_VARIABLES = (
    "OPENAI_API_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""Environment variables from which steps and their libraries read keys."""


def key_variables(recipe: Recipe) -> dict[str, str]:
    """Name -> value of the environment variables that hold API keys and are set in this process.

    They are `KEY_VARIABLES` and those of the recipe's secrets; for each variable X also `X_FILE`, the path of a file
    with the key (see `key_files`). The values are only passed to the containers' environment.
    """
    names = dict.fromkeys((*KEY_VARIABLES, *(variable for _, variable in _secret_variables(recipe))))
    variables = [form for name in names for form in (name, f"{name}_FILE")]
    return {name: os.environ[name] for name in variables if os.environ.get(name)}


def key_files(variables: dict[str, str]) -> list[str]:
    """The paths of key files outside the current folder, which must be mounted too."""
    paths = [Path(os.path.abspath(value)) for name, value in variables.items() if name.endswith("_FILE")]  # noqa: PTH100
    return [str(path) for path in dict.fromkeys(paths) if path.is_file() and not path.is_relative_to(Path.cwd())]


def check_secrets(recipe: Recipe) -> None:
    """Raises ConfigError if a secret of the recipe is not set on this machine, from which containers get it."""
    variables = key_variables(recipe)
    for step, variable in _secret_variables(recipe):
        if not {variable, f"{variable}_FILE"} & set(variables):
            remedy = f"export {variable}, or {variable}_FILE with the path of a file that holds it"
            raise ConfigError(
                f"resources.{step}.secrets: {variable} is not set here, where containers get it from; {remedy}"
            )


def _stop_containers(run: str) -> None:
    """Stops the running containers of a run: steps get SIGTERM and may write a checkpoint; the engine removes them."""
    import docker

    client = docker.from_env()
    try:
        for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run}"}):
            container.stop(timeout=int(ORPHAN_SECONDS))
    finally:
        client.close()


def _secret_variables(recipe: Recipe) -> list[tuple[str, str]]:
    """(step, variable) of every secret of the recipe."""
    steps = (*recipe.steps, TRACKING_TASK)
    return [(step, secret.variable) for step in steps for secret in recipe.resources_of(step).secrets]


def check_images(recipe: Recipe) -> dict[str, str]:
    """Step -> id of its image, pulled if it is missing; raises ConfigError if no engine answers or a pull fails."""
    import docker
    from docker.errors import APIError, DockerException, ImageNotFound

    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        remedy = "start Docker (or set DOCKER_HOST), or run without --on docker"
        raise ConfigError(f"docker: no engine answers ({quote(str(error), 120)}); {remedy}") from error
    try:
        ids: dict[str, str] = {}
        for name in dict.fromkeys(image(recipe, step) for step in (*recipe.steps, TRACKING_TASK)):
            try:
                ids[name] = client.images.get(name).id
            except ImageNotFound:
                ids[name] = client.images.pull(name).id
    except APIError as error:
        remedy = "build it with make images, or give another under images: in the recipe"
        reason = quote(" ".join(str(error.explanation or error).split()), 120)
        raise ConfigError(f"{name}: the image is missing and cannot be pulled ({reason}); {remedy}") from error
    finally:
        client.close()
    return {step: ids[image(recipe, step)] for step in recipe.steps}
