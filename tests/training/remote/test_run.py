"""What is read of a job's folder: the step's own work, whole, and made again where it is gone; what a job is told."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.errors import ConfigError, FolderError, TrainingError
from cappy.progress import FileProgress
from cappy.records.folder import read_manifest, verify, write_manifest
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.remote import run as remote
from cappy.training.remote.following import Phase, Status

Plan = Callable[..., FinetuningConfig]


class Platform:
    """Runs a job to its end in this process as it is submitted, and remembers it for ever, as Vertex AI does."""

    def __init__(self) -> None:
        self.submitted = self.cancelled = 0
        self.going = False
        self.environment: Mapping[str, str] = {}
        self.does: Callable[[FinetuningConfig], object] = run

    def jobs_of(
        self, step: str, plan: FinetuningConfig, inner: FinetuningConfig, environment: Mapping[str, str]
    ) -> "Platform":
        self.inner, self.environment = inner, environment
        return self

    def status(self, name: str) -> Status | None:
        if self.going:
            return Status(Phase.RUNNING)
        return Status(Phase.SUCCEEDED) if self.submitted else None

    def submit(self, name: str) -> None:
        self.does(self.inner)
        self.submitted += 1

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        return iter(())

    def cancel(self, name: str) -> None:
        assert self.going, "nothing is to be cancelled"
        self.going, self.cancelled = False, self.cancelled + 1

    def url_or_command(self, name: str) -> str:
        return "there"


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Platform:
    """The platform that every step of the test submits to."""
    result = Platform()
    monkeypatch.setattr(remote, "open_jobs", result.jobs_of)
    return result


@pytest.fixture
def settings(plan: Plan) -> FinetuningConfig:
    """A step that trains as a job."""
    return plan(launcher="trainjob", epochs=1.0)


def again(settings: FinetuningConfig, *messages: Any) -> None:
    """The step once more, for an output that is not there yet, as an orchestrator gives it."""
    shutil.rmtree(settings.target, ignore_errors=True)
    run(settings, *messages)


def test_the_output_of_a_job_that_is_damaged_is_reported_and_not_published_and_made_again(
    platform: Platform, settings: FinetuningConfig
) -> None:
    run(settings)
    whole = verify(settings.target).hash
    weights = platform.inner.target / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()  # It is the same file as what was published.
    weights.write_bytes(data)
    with raises_naming(FolderError, "model.safetensors", "damaged"):
        again(settings)
    assert not settings.target.exists()
    assert platform.submitted == 1
    again(settings)
    assert platform.submitted == 2
    assert verify(settings.target).hash == whole


def test_a_step_whose_work_was_deleted_trains_again_though_the_platform_remembers_a_job_that_succeeded(
    platform: Platform, settings: FinetuningConfig
) -> None:
    run(settings)
    shutil.rmtree(settings.work)
    again(settings)
    assert platform.submitted == 2
    verify(settings.target)


def test_what_a_job_wrote_is_published_without_another_job_though_the_platform_forgot_it(
    platform: Platform, settings: FinetuningConfig
) -> None:
    run(settings)
    again(settings)
    assert platform.submitted == 1
    platform.submitted = 0
    again(settings)
    assert platform.submitted == 0
    verify(settings.target)


def test_a_job_that_succeeds_under_the_eyes_of_the_step_and_leaves_nothing_is_not_submitted_again(
    platform: Platform, settings: FinetuningConfig
) -> None:
    platform.does = lambda inner: None
    with raises_naming(TrainingError, "succeeded", "target", "--work", "volume"):
        run(settings)
    assert platform.submitted == 1


def test_a_fresh_start_cancels_the_job_that_still_does_the_work(platform: Platform, settings: FinetuningConfig) -> None:
    run(settings)
    platform.going = True
    again(dataclasses.replace(settings, fresh="two"))
    assert (platform.cancelled, platform.submitted) == (1, 2)
    verify(settings.target)


@pytest.mark.parametrize("other", [{"step": "pretraining"}, {"parents": ("0" * 64,)}, {"config": {"epochs": 2.0}}])
def test_an_output_of_other_work_is_reported_and_not_published(
    other: dict[str, Any], platform: Platform, settings: FinetuningConfig
) -> None:
    def do(inner: FinetuningConfig) -> None:
        run(inner)
        write_manifest(inner.target, dataclasses.replace(read_manifest(inner.target), **other))

    platform.does = do
    with raises_naming(TrainingError, "target", "other work", "delete it"):
        run(settings)
    assert not settings.target.exists()


def test_the_progress_of_an_earlier_job_is_not_reported_as_this_ones(
    platform: Platform, settings: FinetuningConfig
) -> None:
    run(settings)
    shutil.rmtree(platform.inner.target)
    FileProgress(platform.inner.target.parent / "finetuning.json")(999, 999, unit="updates")
    messages = []

    def progress(done: int, total: int | None = None, **_: object) -> None:
        messages.append(done)

    again(settings, progress)
    assert platform.submitted == 2
    assert messages == []


@pytest.mark.parametrize(
    ("address", "passed"),
    [("https://mlflow.example", True), ("https://me:secret@mlflow.example", False), ("", False)],
)
def test_a_job_is_reported_the_tracking_address_unless_it_holds_a_password(
    address: str, passed: bool, platform: Platform, settings: FinetuningConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(inner: FinetuningConfig) -> None:
        raise ConfigError("the quota is used up")

    platform.does = refuse
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with contextlib.suppress(ConfigError):
        run(settings)
    assert platform.environment["CAPPY_STEP_VERSION"]
    assert Path(platform.environment["CAPPY_PROGRESS"]).is_relative_to(settings.work)
    assert platform.environment.get("MLFLOW_TRACKING_URI") == (address if passed else None)
