"""CustomJobs, by the real SDK over REST against a server that parses what it sends into the SDK's own messages.

It shows what is asked of Vertex AI and how its answers are read, not that Google grants it: no request ever left this
machine. The job's own command runs in a process here, as the machines would run it.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names

pytest.importorskip("google.cloud.aiplatform", reason="no Vertex AI SDK here: pip install 'cappy-scorer[gcp]'")
from vertex_scenario import connect
from vertex_server import Vertex, vertex_server
from wording import raises_naming

from cappy.config import to_values
from cappy.errors import ConfigError, TrainingError, UnansweredError
from cappy.records.folder import verify
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.remote import run as remote
from cappy.training.remote import vertex
from cappy.training.remote.following import Phase, Status
from cappy.training.remote.vertex import worker_pools

# The SDK warns of its own protobuf and of REST being in preview.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
Plan = Callable[..., FinetuningConfig]
ROOT = Path(__file__).parents[3]
NAME = "cappy-finetuning-0"
CLOUD: dict[str, Any] = {
    "launcher": "customjob",
    "image": f"registry.example/cappy@sha256:{'0' * 64}",
    "customjob": {"project": "my-project", "bucket": "gs://bucket"},
}


@pytest.fixture
def server() -> Iterator[Vertex]:
    with vertex_server() as result:
        connect(result)
        yield result


@pytest.fixture
def jobs(server: Vertex, plan: Plan) -> Callable[..., Any]:
    """jobs(**settings) -> the CustomJobs of a step with these settings."""

    def make(**values: Any) -> Any:
        from cappy.training.remote.vertex import CustomJobs

        settings = plan(**{**CLOUD, **values})
        shared = {name: getattr(settings, name) for name in ("nodes", "devices", "scorer", "work")}
        result = CustomJobs("finetuning", settings, plan(**shared), {"A": "b"})
        result.logging_url = server.address
        return result

    return make


def test_the_job_asks_for_machines_their_accelerators_the_volume_spot_and_an_end(
    server: Vertex, jobs: Callable[..., Any]
) -> None:
    result = jobs(
        nodes=3,
        devices=2,
        customjob={
            **CLOUD["customjob"],
            "machine": "g2-standard-24",
            "accelerator": "NVIDIA_L4",
            "spot": True,
            "volume": "10.0.0.2:/export:/mnt/nfs/work",
            "network": "projects/1/global/networks/default",
        },
        work="/mnt/nfs/work/cappy",
        scorer="builtin:tiny",
        service_account="trainer@my-project.iam.gserviceaccount.com",
        timeout_hours=2.0,
    )
    assert result.status(NAME) is None
    result.submit(NAME)
    (job,) = server.custom_jobs
    spec = job["jobSpec"]
    assert job["displayName"] == NAME
    assert spec["scheduling"] == {"timeout": "7200s", "restartJobOnWorkerRestart": True, "strategy": 4}
    assert spec["network"] == "projects/1/global/networks/default"
    assert spec["serviceAccount"] == "trainer@my-project.iam.gserviceaccount.com"
    assert spec["baseOutputDirectory"]["outputUriPrefix"].startswith("gs://bucket/")
    first, others = spec["workerPoolSpecs"]
    assert (int(first["replicaCount"]), int(others["replicaCount"])) == (1, 2)
    assert first["machineSpec"]["machineType"] == "g2-standard-24"
    assert first["machineSpec"]["acceleratorCount"] == 2
    assert first["nfsMounts"] == [{"server": "10.0.0.2", "path": "/export", "mountPoint": "work"}]
    assert first["containerSpec"]["env"] == [{"name": "A", "value": "b"}]
    assert first["containerSpec"]["command"] == ["python", "-m", "cappy.training"]


def test_a_job_on_machines_that_stay_says_nothing_of_spot(server: Vertex, jobs: Callable[..., Any]) -> None:
    jobs().submit(NAME)
    assert "strategy" not in server.custom_jobs[0]["jobSpec"]["scheduling"]


def test_a_vertex_job_that_cannot_work_is_refused_in_one_line(plan: Plan) -> None:
    machine: dict[str, Any] = {"image": "image", "machine_type": "ct5lp-hightpu-4t"}
    tpu: Any
    (tpu,) = worker_pools("finetuning", plan(parallelism="jax", devices=4), **machine)
    assert "accelerator_type" not in tpu["machine_spec"]
    with raises_naming(ConfigError, "finetuning:", "--parallelism jax", "2 were requested", "--nodes 1"):
        worker_pools("finetuning", plan(parallelism="jax", nodes=2), **machine)
    with raises_naming(ConfigError, "finetuning:", "--work gs:/bucket/work:", "absolute path", "NFS"):
        worker_pools("finetuning", plan(work=Path("gs://bucket/work")), **machine)


def test_a_vertex_job_asks_for_the_machines_and_accelerators_of_the_plan(plan: Plan) -> None:
    first: Any
    first, others = worker_pools(
        "finetuning",
        plan(nodes=3, devices=4),
        image="image@sha256:0",
        machine_type="a2-highgpu-4g",
        accelerator_type="NVIDIA_TESLA_A100",
        environment={"CAPPY_ZONE": "a"},
    )
    assert (first["replica_count"], others["replica_count"]) == (1, 2)
    assert first["machine_spec"] == others["machine_spec"]
    assert first["machine_spec"]["accelerator_count"] == 4
    assert first["container_spec"]["env"] == [{"name": "CAPPY_ZONE", "value": "a"}]
    (alone,) = worker_pools("finetuning", plan(), image="image", machine_type="n1-standard-8")
    assert alone["machine_spec"] == {"machine_type": "n1-standard-8"}
    with raises_naming(ConfigError, "finetuning:", "2 devices", "accelerator_type", "--devices 1"):
        worker_pools("finetuning", plan(devices=2), image="image", machine_type="n1-standard-8")


@pytest.mark.parametrize(
    ("state", "error", "expected"),
    [
        ("JOB_STATE_QUEUED", None, Status(Phase.PENDING)),
        ("JOB_STATE_PENDING", None, Status(Phase.PENDING)),
        ("JOB_STATE_RUNNING", None, Status(Phase.RUNNING)),
        ("JOB_STATE_CANCELLING", None, Status(Phase.RUNNING)),
        ("JOB_STATE_SUCCEEDED", None, Status(Phase.SUCCEEDED)),
        ("JOB_STATE_CANCELLED", (1, "cancelled"), Status(Phase.CANCELLED)),
        ("JOB_STATE_FAILED", (3, "status 1"), Status(Phase.FAILED, "'status 1'")),
        ("JOB_STATE_FAILED", (14, "no capacity"), Status(Phase.FAILED, "'no capacity'", preempted=True)),
        ("JOB_STATE_FAILED", (13, "VM was\npreempted"), Status(Phase.FAILED, "'VM was preempted'", preempted=True)),
        (
            "JOB_STATE_FAILED",
            (14, "failed to pull the image"),
            Status(Phase.FAILED, "'failed to pull the image'", cannot_start=True),
        ),
    ],
)
def test_every_state_is_read_and_of_a_failed_job_why(
    state: str, error: tuple[int, str] | None, expected: Status, server: Vertex, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    result.submit(NAME)
    server.custom_jobs[0] |= {"state": state, **({"error": {"code": error[0], "message": error[1]}} if error else {})}
    assert result.status(NAME) == expected


def test_of_jobs_of_one_name_the_newest_counts_and_another_name_is_another_job(
    server: Vertex, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    result.submit(NAME)
    server.custom_jobs[0]["state"] = "JOB_STATE_FAILED"
    result.submit(NAME)
    assert result.status(NAME) == Status(Phase.PENDING)
    assert result.status(f"{NAME}1") is None
    result.cancel(NAME)
    assert [one["state"] for one in server.custom_jobs] == ["JOB_STATE_FAILED", "JOB_STATE_CANCELLED"]
    result.cancel(NAME)
    assert sum(call.endswith(":cancel") for call in server.calls) == 1, "what is over is not cancelled"


def test_where_the_log_lies_is_reported(server: Vertex, jobs: Callable[..., Any]) -> None:
    result = jobs()
    assert result.url_or_command(NAME) == (
        f"gcloud ai custom-jobs list --region=us-central1 --project=my-project --filter=displayName={NAME}"
    )
    result.submit(NAME)
    page, _, command = result.url_or_command(NAME).partition(" or ")
    assert page.startswith("https://console.cloud.google.com/")
    assert "4000" in page
    assert command == "gcloud ai custom-jobs stream-logs 4000 --region=us-central1 --project=my-project"
    assert list(result.lines(NAME)) == []


def entry(number: int, node: str, text: str) -> dict[str, Any]:
    labels = {"job_id": "4000", "task_name": node}
    stamp = f"2026-01-01T00:00:{number:02d}Z"
    return {"insertId": str(number), "timestamp": stamp, "textPayload": text, "resource": {"labels": labels}}


def test_every_line_of_every_machine_is_reported_once(server: Vertex, jobs: Callable[..., Any]) -> None:
    result = jobs()
    result.submit(NAME)
    server.entries = [entry(1, "workerpool0-0", "a"), entry(2, "workerpool1-0", "b\nc")]
    assert list(result.lines(NAME)) == [("workerpool0-0", "a"), ("workerpool1-0", "b"), ("workerpool1-0", "c")]
    server.entries.append(entry(3, "workerpool0-0", "d"))
    assert list(result.lines(NAME)) == [("workerpool0-0", "d")]


def test_a_log_that_may_not_be_read_is_reported_once_and_ends_nothing(server: Vertex, jobs: Callable[..., Any]) -> None:
    result = jobs()
    result.submit(NAME)
    server.unreadable = True
    ((_, line),) = list(result.lines(NAME))
    assert_names(line, "403", "roles/logging.viewer", "console.cloud.google.com")
    assert list(result.lines(NAME)) == []


def test_a_quota_a_missing_right_and_a_service_that_is_away_are_one_line(
    server: Vertex, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    for code, words, kind in (
        (403, "Permission 'aiplatform.customJobs.create' denied", ConfigError),
        (429, "Quota exceeded for custom_model_training_nvidia_l4_gpus", ConfigError),
        (500, "internal", UnansweredError),
    ):
        server.refuse = (code, words)
        with pytest.raises(kind, match=words) as caught:
            result.submit(NAME)
        assert "\n" not in str(caught.value)
        assert "my-project" in str(caught.value)
    assert server.custom_jobs == []


@contextlib.contextmanager
def machines(server: Vertex, end: str = "JOB_STATE_SUCCEEDED") -> Iterator[None]:
    """Plays Vertex AI: runs each new job's command in a process, cancels it when asked to, and says how it ended."""
    done = threading.Event()

    def one(job: dict[str, Any]) -> None:
        (pool,) = job["jobSpec"]["workerPoolSpecs"]
        container = pool["containerSpec"]
        actual = {entry["name"]: entry["value"] for entry in container["env"]}
        command = [sys.executable, *container["command"][1:], *container["args"]]
        job["state"] = "JOB_STATE_RUNNING"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **actual}
        process = subprocess.Popen(command, env=environment)
        killed = False
        while process.poll() is None:
            if job["state"] == "JOB_STATE_CANCELLED" or done.is_set():
                process.terminate()
            elif job.pop("preempt", False):
                process.kill()
                killed = True
            time.sleep(0.05)
        if killed:
            job |= {"state": "JOB_STATE_FAILED", "error": {"code": 14, "message": "The VM was preempted."}}
        elif job["state"] != "JOB_STATE_CANCELLED":
            job["state"] = end if process.returncode == 0 else "JOB_STATE_FAILED"

    def serve() -> None:
        seen = 0
        while not done.wait(0.05):
            if len(server.custom_jobs) > seen:
                seen += 1
                one(server.custom_jobs[seen - 1])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Trigger:
    """Progress that remembers, and does something at an update."""

    def __init__(self, at: int = -1, do: Callable[[], object] = lambda: None) -> None:
        self.at, self.do = at, do
        self.updates: list[tuple[int, int]] = []

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = ""
    ) -> None:
        if unit == "updates":
            self.updates.append((done, resumed))
            if self.at >= 0 and done >= self.at:
                self.at = -1
                self.do()


def test_a_preempted_job_goes_on_at_its_checkpoint_and_what_it_wrote_is_published(
    server: Vertex, plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(vertex, "LOGGING_URL", server.address)
    settings = {"epochs": 8.0, "patience": 50}
    here = run(plan("here", **settings))
    actual = Trigger(at=3, do=lambda: server.custom_jobs[0].update(preempt=True))
    with machines(server):
        manifest = run(plan("there", **CLOUD, **settings), actual)
    assert verify(plan("there").target).hash == manifest.hash == here.hash
    assert [one["state"] for one in server.custom_jobs] == ["JOB_STATE_FAILED", "JOB_STATE_SUCCEEDED"]
    assert actual.updates[-1][1] >= 3, "it went on where it was"
    assert_names(capsys.readouterr().err, "'The VM was preempted.'", "submitted again")


def test_a_step_that_is_cancelled_cancels_its_job_and_keeps_the_checkpoint(
    server: Vertex, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(vertex, "LOGGING_URL", server.address)
    actual = Trigger(at=2, do=lambda: os.kill(os.getpid(), 15))
    settings = plan(**CLOUD, epochs=500.0, patience=100)
    with machines(server), raises_naming(TrainingError, "cancelled", "SIGTERM"):
        run(settings, actual)
    assert [one["state"] for one in server.custom_jobs] == ["JOB_STATE_CANCELLED"]
    assert list(settings.work.glob("finetuning/*/.checkpoints/0*"))
    assert not settings.target.exists()


def test_a_job_that_succeeded_and_left_nothing_where_the_step_looks_is_reported_and_submitted_again_by_the_next_run(
    server: Vertex, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(vertex, "LOGGING_URL", server.address)
    settings = plan(**CLOUD)

    done = threading.Event()

    def succeed() -> None:
        while not done.wait(0.01):
            for job in server.custom_jobs:
                job["state"] = "JOB_STATE_SUCCEEDED"

    thread = threading.Thread(target=succeed)
    thread.start()
    try:
        for count in (1, 2):
            with raises_naming(TrainingError, "succeeded", "target", "--work", "volume"):
                run(settings)
            assert len(server.custom_jobs) == count, "Vertex AI keeps the job that ended in its list"
    finally:
        done.set()
        thread.join()


def test_a_job_with_another_version_of_the_step_in_its_image_ends_at_once_in_one_line(plan: Plan) -> None:
    from cappy.config import encode

    done = subprocess.run(
        [sys.executable, "-m", "cappy.training", "finetuning", encode(to_values(plan()))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CAPPY_STEP_VERSION": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert_names(done.stderr, "cappy finetuning: ", "version", "both images")
