"""A pipeline of two made-up rooms, small enough to run in a second, on the real runner and the real components."""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy.config import encode
from pipelines.submission import Submission

ROOMS = '''
    """Two steps that do as they are told: write a row, take their time, fail."""
    import os
    import signal
    import sys
    import time
    from pathlib import Path
    from typing import Annotated

    from cappy.config import DEFAULT_WORK, Location, Work, settings
    from cappy.errors import RecordError
    from cappy.records import Instance, Manifest, read_manifest
    from cappy.records.folder import publish, write_part


    @settings
    class PreparationConfig:
        target: Location
        source: str = ""
        seed: int = 0
        seconds: float = 0.0
        fail: str = ""
        work: Work = DEFAULT_WORK


    @settings
    class AnnotationConfig:
        source: Location
        target: Location
        metric: str = ""
        seconds: float = 0.0
        fail: str = ""
        work: Work = DEFAULT_WORK


    def _end(*_):
        """Takes its time to end well, as training does."""
        time.sleep(1.0)
        Path(os.environ["BEAT"]).with_suffix(".checkpoint").touch()
        sys.exit(1)


    def run(config, progress):
        Path(os.environ["BEAT"]).with_suffix(f".{os.getpid()}").touch()
        if config.fail == "asked to end":
            signal.signal(signal.SIGTERM, _end)
        progress(0, 10)
        end = time.monotonic() + config.seconds
        while time.monotonic() < end:
            Path(os.environ["BEAT"]).write_text(repr(time.time()))
            time.sleep(0.02)
        if config.fail == "mend":
            raise RecordError("notes.jsonl:3: reference is empty; give it a text")
        if config.fail == "defect":
            raise ZeroDivisionError("a defect of ours")
        if config.fail == "killed":
            os.kill(os.getpid(), 9)
        progress(10, 10)
        folder = config.work / "made"
        folder.mkdir(parents=True, exist_ok=True)
        row = Instance(instance_id="1", instruction="Add 1 and 1.", references=("2",))
        manifest = Manifest(step="made", files=(write_part(folder, 0, [row]),))
        publish(folder, config.target, manifest)
        return manifest
'''

PIPELINE = '''
    """preparation -> annotation, whose steps do the work of a test."""
    from kfp import dsl
    from kfp.dsl import Dataset, Input, Output

    from components import component

    RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER


    @component()
    def preparation(instances: Output[Dataset], settings: str = "", fingerprint: str = ""):
        from dataclasses import replace

        from cappy import worker

        worker.STEP_SPECS["preparation"] = replace(worker.STEP_SPECS["preparation"], module="made_rooms")
        worker.launch("preparation", settings, fingerprint=fingerprint, target=instances.path)


    @component()
    def annotation(candidates: Input[Dataset], annotated: Output[Dataset], settings: str = "", fingerprint: str = ""):
        from dataclasses import replace

        from cappy import worker

        worker.STEP_SPECS["annotation"] = replace(worker.STEP_SPECS["annotation"], module="made_rooms")
        folders = {"source": candidates.path, "target": annotated.path}
        worker.launch("annotation", settings, fingerprint=fingerprint, **folders)


    @component()
    def farewell(status: dsl.PipelineTaskFinalStatus, run: str = ""):
        import os
        from pathlib import Path

        Path(os.environ["BEAT"]).with_suffix(".state").write_text(f"{status.state} {run}")


    @dsl.pipeline(name="made-up")
    def made_up(first: str = "", second: str = "", one: str = "", two: str = ""):
        last = farewell(run=RUN).set_caching_options(False)
        with dsl.ExitHandler(last):
            prepared = preparation(settings=first, fingerprint=one)
            annotation(candidates=prepared.outputs["instances"], settings=second, fingerprint=two)
'''


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    from cappy.registry.client import connect

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    with connect(f"sqlite:///{path}"):
        return path


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Submission]:
    """made_up(first={...}, second={...}, one="...", two="...") -> a submission of the two-step pipeline."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "made_rooms.py").write_text(textwrap.dedent(ROOMS))
    (modules / "made_pipeline.py").write_text(textwrap.dedent(PIPELINE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("BEAT", str(tmp_path / "beat"))
    monkeypatch.chdir(tmp_path)

    def submission(
        first: dict[str, object] | None = None,
        second: dict[str, object] | None = None,
        one: str = "1" * 8,
        two: str = "2" * 8,
    ) -> Submission:
        work = {"work": str(tmp_path / "work-python3")}
        arguments = {"first": encode({**work, **(first or {})}), "second": encode({**work, **(second or {})})}
        return Submission(
            pipeline="made-up",
            arguments={**arguments, "one": one, "two": two},
            fingerprints={"preparation": one, "annotation": two},
        )

    return submission
