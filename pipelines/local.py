"""Runs a pipeline on this machine, on kfp's own local runner, and shows a person how far each step is.

Steps run in processes, or in containers of the engine here, which must answer and have the images; containers get their
keys by environment.
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
from pipelines.clients.local import STATUS, Request, Target
from pipelines.customize import image
from pipelines.planning import settings_of, work_of
from pipelines.recipe import Platform, Recipe
from pipelines.states import StepState, StepTable, log_section, observe
from pipelines.submission import Submission, fingerprints, prepare

LOOK_SECONDS = 0.2
TAIL_LINES = 15
MANGLED = "python3"
"""kfp's local runner replaces this text inside every argument by the path of the interpreter."""

_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt): ")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run left: each step's output folder, which steps came from the cache, seconds by step."""

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
) -> Outcome:
    """Runs a recipe's pipeline on this machine and waits for it.

    `root` gets the artifacts (`pipeline/`) and the logs (`runs/<run id>/`); `images` are the ids of the images by step,
    where the platform is docker. CappyError with the failed step's own line if one fails; Ctrl-C and SIGTERM end every
    process of the run and raise KeyboardInterrupt.
    """
    work = work_of(recipe, platform)
    recipe, mark = _with_fresh_name(recipe, work)
    submission = prepare(
        recipe.pipeline,
        settings_of(recipe),
        work=work,
        shards=recipe.shards,
        tracking_uri=recipe.tracking_uri,
        revision=recipe.revision,
        images=images,
    )
    request: Target = {"recipe": to_values(_without_passwords(recipe)), "platform": platform}
    outcome = execute(request, submission, work=work, root=root, show=show)
    if mark is not None:
        mark.unlink(missing_ok=True)
    return outcome


def _with_fresh_name(recipe: Recipe, work: Path) -> tuple[Recipe, Path | None]:
    """The recipe under the name of a fresh start that was not finished, and the file that keeps the name until it is.

    A new fresh start removes kfp's cache, which is of the runs before it: without it a later run takes up what lies in
    the work folder.
    """
    names = {str(values["fresh"]) for values in recipe.settings.values() if values.get("fresh")}
    if not names:
        return recipe, None
    plain = {step: {**values, "fresh": ""} for step, values in settings_of(recipe).items()}
    digests = fingerprints(plain, tracking_uri=recipe.tracking_uri, revision=recipe.revision)
    mark = work / "unfinished" / list(digests.values())[-1]
    try:
        name = mark.read_text(encoding="utf-8")
    except FileNotFoundError:
        name = names.pop()
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(mark, name.encode())
        with contextlib.suppress(FileNotFoundError):
            remove_folder(work / "cache")
    settings = {step: {**recipe.settings.get(step, {}), "fresh": name} for step in recipe.steps}
    return replace(recipe, settings=settings), mark


def _without_passwords(recipe: Recipe) -> Recipe:
    """The recipe as it may be written down: the child has MLflow's address in its environment."""
    settings = {
        step: {name: value for name, value in values.items() if name != "tracking_uri" or not has_secret(str(value))}
        for step, values in recipe.settings.items()
    }
    address = "" if has_secret(recipe.tracking_uri) else recipe.tracking_uri
    return replace(recipe, settings=settings, tracking_uri=address)


def execute(target: str | Target, submission: Submission, *, work: Path, root: Path, show: bool = True) -> Outcome:
    """Runs a kfp pipeline with a submission's arguments: a recipe's, or the one at `target` (module:name)."""
    root, work = root.absolute(), work.absolute()
    _refuse_mangled({"the folder of the run": str(root), **submission.arguments})
    run_id = f"{submission.pipeline}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = root / "runs" / run_id
    make_private(folder)
    request = folder / "request.json"
    executed: Target = {"pipeline": target} if isinstance(target, str) else target
    values: Request = {
        **executed,
        "arguments": submission.arguments,
        "process": os.getpid(),
        "work": str(work),
        "run": run_id,
        "pipeline_root": str(root / "pipeline"),
        "cache_root": str(work / "cache"),
        "fingerprints": submission.fingerprints,
    }
    write_bytes(request, json.dumps(values, indent=1).encode())

    def look(alive: bool, succeeded: bool = False) -> list[StepState]:
        return observe(
            submission.fingerprints, work=work, progress=folder, run=run_id, alive=alive, succeeded=succeeded
        )

    lock = hold_parent_lock(folder / "parent.lock")
    try:
        title, log = f"cappy {submission.pipeline}", folder / "run.log"
        with _interrupt_on_sigterm(), StepTable(title, log, show=show) as table:
            status = _supervise(request, submission.tracking_uri, lambda: table.update(look(alive=True)))
            states = look(alive=False, succeeded=status == 0)
            (folder / STATUS).write_text(json.dumps({"status": status}))
            table.update(states)
    finally:
        if values.get("platform") == "docker":
            _end_containers(run_id)  # The engine runs them, so that no signal to a group of processes reaches them.
        os.close(lock)
    if status:
        _raise_failure(states, folder / "run.log", show=show)
    return _outcome(run_id, folder, states)


def _supervise(request: Path, tracking_uri: str, look: Callable[[], None]) -> int:
    """Starts the child and waits for it; an interrupt ends it and the steps beneath it."""
    folder = request.parent
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        # Steps that get no address of MLflow (evaluation loads the champion) take it from here.
        **({"MLFLOW_TRACKING_URI": tracking_uri} if tracking_uri else {}),
        PARENT_VARIABLE: str(folder / "parent.lock"),
        PROGRESS_VARIABLE: str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        # Without it a file of the current folder that is named like a module would take that module's place.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with (folder / "run.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 (our own module)
            [sys.executable, "-m", "pipelines.execution", str(request)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_SECONDS)
            look()
    finally:
        _end_group(process)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Asks the child's whole group to end, and ends what does not; nothing to do after a normal end.

    The child itself ends at once, a step beneath it may write a checkpoint first.
    """
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + ORPHAN_SECONDS
        while time.monotonic() < end:
            process.poll()  # Else the group has a member for as long as nobody asked how it ended.
            os.killpg(process.pid, 0)
            time.sleep(LOOK_SECONDS / 4)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """For the block SIGTERM does what Ctrl-C does, so that the run's processes are ended and one line says so.

    A shell starts what a script puts in the background with Ctrl-C's own signal ignored; a handler that somebody else
    has set stays, and outside the main thread none can be.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _refuse_mangled(arguments: Mapping[str, object]) -> None:
    for name, value in arguments.items():
        if MANGLED in json.dumps(value):
            remedy = "choose another name (kfp's local runner rewrites that text inside arguments)"
            raise ConfigError(f"{name}: holds the text {MANGLED!r}, got {quote(value)}; {remedy}")


def _raise_failure(states: list[StepState], log: Path, *, show: bool) -> None:
    """Raises the failed step's own line; of a defect, which has none, the last lines of its log are shown first."""
    failed = [state for state in states if state.state == "failed"] or [StepState(step="tracking", state="failed")]
    name = failed[0].step.partition(" ")[0]  # Shards write under the name of their step, and into each other's lines.
    prefix = f"cappy {name}: "
    written = [line.strip() for line in log_section(log, "")]
    said = [line.removeprefix(prefix) for line in written if line.startswith(prefix)]
    named = next((state for state in failed if state.error in said), failed[0])
    if said:
        raise CappyError(f"{named.step}: {named.error if named.error in said else said[-1]}")
    lines = log_section(log, name)
    if show:
        sys.stderr.write("\n".join(lines[-TAIL_LINES:]) + "\n")
    raised = next((line for line in reversed(lines) if _EXCEPTION.match(line)), "")
    reason = named.error or raised or "its process was killed (out of memory?)"
    raise CappyError(f"{named.step}: {reason}; the whole log is {log}")


def _outcome(run_id: str, folder: Path, states: list[StepState]) -> Outcome:
    return Outcome(
        run_id=run_id,
        folder=folder,
        log=folder / "run.log",
        outputs={state.step: state.target for state in states if state.target is not None},
        cached=frozenset(state.step for state in states if state.state == "cached"),
        seconds={state.step: state.seconds for state in states if state.state == "done"},
    )


RUN_LABEL = "cappy.run"
"""The label that names a container's run."""
KEYS = (
    "OPENAI_API_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""Variables that steps, or what they call, take keys from by themselves."""


def keys(recipe: Recipe) -> dict[str, str]:
    """The variables with keys that are set here: the library's own, and those that the recipe's secrets name.

    `X_FILE` comes along for each X: it names a file that holds the key, see `key_files`. The values are for the
    containers' environment and stand nowhere else.
    """
    names = dict.fromkeys((*KEYS, *(variable for _, variable in _named_secrets(recipe))))
    variables = [form for name in names for form in (name, f"{name}_FILE")]
    return {name: os.environ[name] for name in variables if os.environ.get(name)}


def key_files(variables: dict[str, str]) -> list[str]:
    """The files with keys that lie outside the current folder, which alone a container sees."""
    paths = [Path(os.path.abspath(value)) for name, value in variables.items() if name.endswith("_FILE")]  # noqa: PTH100
    return [str(path) for path in dict.fromkeys(paths) if path.is_file() and not path.is_relative_to(Path.cwd())]


def check_secrets(recipe: Recipe) -> None:
    """ConfigError where a secret of the recipe is not set on this machine, from where containers get it."""
    variables = keys(recipe)
    for step, variable in _named_secrets(recipe):
        if not {variable, f"{variable}_FILE"} & set(variables):
            remedy = f"export {variable}, or {variable}_FILE with the path of a file that holds it"
            raise ConfigError(
                f"resources.{step}.secrets: {variable} is not set here, where containers get it; {remedy}"
            )


def _end_containers(run: str) -> None:
    """Stops what still runs of a run: its steps get SIGTERM and may write a checkpoint; the engine removes them."""
    import docker

    client = docker.from_env()
    try:
        for container in client.containers.list(filters={"label": f"{RUN_LABEL}={run}"}):
            container.stop(timeout=int(ORPHAN_SECONDS))
    finally:
        client.close()


def _named_secrets(recipe: Recipe) -> list[tuple[str, str]]:
    """Step and variable of every secret that the recipe names."""
    steps = (*recipe.steps, "tracking")
    return [(step, secret.variable) for step in steps for secret in recipe.needs(step).secrets]


def check_images(recipe: Recipe) -> dict[str, str]:
    """Step -> what pins its image; ConfigError where no engine answers, or one is neither here nor to be pulled."""
    import docker
    from docker.errors import APIError, DockerException, ImageNotFound

    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        remedy = "start Docker (DOCKER_HOST says where it is), or run without --on docker"
        raise ConfigError(f"docker: no engine answers ({quote(str(error), 120)}); {remedy}") from error
    try:
        ids: dict[str, str] = {}
        for name in dict.fromkeys(image(recipe, step) for step in (*recipe.steps, "tracking")):
            try:
                ids[name] = client.images.get(name).id
            except ImageNotFound:
                ids[name] = client.images.backward(name).id
    except APIError as error:
        remedy = "build it with make images, or name another under images: in the recipe"
        reason = quote(" ".join(str(error.explanation or error).split()), 120)
        raise ConfigError(f"{name}: is not here and cannot be pulled ({reason}); {remedy}") from error
    finally:
        client.close()
    return {step: ids[image(recipe, step)] for step in recipe.steps}
