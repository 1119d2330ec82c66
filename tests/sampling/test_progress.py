"""Progress within a part of sampling: candidates, rate and time left, also where nothing is complete yet (D8c)."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Model, serving
from wording import assert_names

from cappy.model_folder import open_model_folder
from cappy.progress import PLAIN_SECONDS, ProgressLine, ProgressState, describe, silent
from cappy.records import Instance, write
from cappy.sampling import local, statistics
from cappy.sampling.architectures import Causal, Seq2Seq
from cappy.sampling.endpoint import limits
from cappy.sampling.endpoint.limits import UsageMeter
from cappy.sampling.generators import EndpointConfig
from cappy.sampling.local import LocalLLM
from cappy.sampling.statistics import HEARTBEAT_SECONDS, SamplingProgress
from cappy.sampling.step import SamplingConfig, run
from cappy.sampling.strategies import GREEDY, parse_strategy


class Records:
    """A progress that keeps what it hears, as a person would read it after ten seconds."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.dones: list[int] = []

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        self.dones.append(done)
        state = ProgressState(done=done, total=total, unit=unit, resumed=resumed, started=0.0, updated=10.0, note=note)
        self.lines.append(describe(state))


class Named:
    """As much of a generator as the progress needs."""

    name = "named"


def made(progress: Records, samples: int = 4) -> SamplingProgress:
    return SamplingProgress(progress, [Named()], [replace(GREEDY, num_samples=samples)])  # type: ignore[list-item]


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def generator(request: pytest.FixtureRequest, causal_folder: Path, llm_folder: Path) -> LocalLLM:
    if request.param == "causal":
        return Causal("tiny", open_model_folder(causal_folder))
    return Seq2Seq("tiny", open_model_folder(llm_folder))


def test_a_local_llm_says_after_each_token_how_far_its_candidates_are(generator: LocalLLM) -> None:
    """D8c: one batch, and no candidate may be complete for long."""
    heard: list[tuple[int, float]] = []

    def on_candidates(candidates: int, /, *, in_progress: float = 0.0) -> None:
        heard.append((candidates, in_progress))

    decodings = [replace(one, max_new_tokens=30) for one in parse_strategy("greedy+beam2+sampling4")]
    generator.sample(["where is the dog", "the cat"], decodings, seed=0, on_candidates=on_candidates)
    assert sum(candidates for candidates, _ in heard) == 12
    assert len(heard) >= 40
    work, complete = [], 0
    for candidates, in_progress in heard:
        complete += candidates
        work.append(complete + in_progress)
    assert all(after >= before - 1e-9 for before, after in pairwise(work))
    assert work[-1] == 12.0


def test_the_time_left_is_known_before_an_instance_is_complete() -> None:
    progress = Records()
    actual = made(progress)
    actual(0, 440, unit="instances")
    actual.add_candidates(1, in_progress=0.5)
    assert progress.lines[-1].startswith("0 of 440 instances, 1 candidates (")
    assert progress.lines[-1].endswith(" left")
    actual.add_candidates(0, in_progress=39.0)
    # Ten instances' worth of work: the line says it as for whole ones, and the time left once.
    assert progress.lines[-1].startswith("10 of 440 instances")
    assert_names(progress.lines[-1], "1 instances/s", "7 min 10 s left", "1 candidates (")
    assert progress.lines[-1].count("left") == 1
    actual(64, 440)
    assert progress.lines[-1].startswith("64 of 440 instances")
    assert progress.dones == sorted(progress.dones)


def test_work_under_way_never_counts_beyond_the_total() -> None:
    progress = Records()
    actual = made(progress)
    actual(0, 3)
    actual.add_candidates(12, in_progress=9.0)
    assert progress.dones == [0, 3]


@contextmanager
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "HEARTBEAT_SECONDS", 0.01)
        yield


def test_a_silent_generator_does_not_silence_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """D8c: beams, likelihoods of choices, vLLM and endpoints may all be silent for long."""
    progress, enough = Records(), threading.Event()

    def counted(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        progress(done, total, unit=unit, resumed=resumed, note=note)
        if len(progress.lines) >= 10:
            enough.set()

    with fast_heartbeat(monkeypatch), SamplingProgress(counted, [], []) as actual:
        actual(1, 5)
        assert enough.wait(30)
    said = len(progress.lines)
    assert not [thread for thread in threading.enumerate() if thread is actual._heartbeat]
    assert len(progress.lines) == said


def test_the_heart_stops_where_a_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        fast_heartbeat(monkeypatch),
        pytest.raises(ValueError, match="broken"),
        SamplingProgress(silent, [], []) as actual,
    ):
        raise ValueError("broken")
    assert not actual._heartbeat.is_alive()


def test_progress_that_cannot_be_written_ends_the_heart_and_not_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        raise OSError("no space left")

    with fast_heartbeat(monkeypatch), SamplingProgress(full, [], []) as actual:
        actual._heartbeat.join(30)
        assert not actual._heartbeat.is_alive()


def test_a_log_hears_at_least_every_fifteen_seconds() -> None:
    """D8c: a line is due after PLAIN_SECONDS, and the next heartbeat writes it."""

    assert PLAIN_SECONDS + HEARTBEAT_SECONDS <= 15


def test_the_log_of_one_part_tells_candidates_rate_and_time_left(
    tmp_path: Path, causal_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D8c: as it is in the field, one part and one batch, to a stderr that is not a terminal."""
    write(tmp_path / "in", [Instance(instance_id=str(n), instruction=f"say {n}", references=("x",)) for n in range(8)])
    config = SamplingConfig(
        source=tmp_path / "in",
        target=tmp_path / "out",
        generator=(str(causal_folder),),
        strategy="greedy+sampling3",
        max_new_tokens=40,
        work=tmp_path / "work",
    )
    with ProgressLine("cappy sampling", plain_seconds=0.0) as progress:
        run(config, progress)
    lines = capsys.readouterr().err.splitlines()
    within = [line for line in lines if "8 of 8" not in line and "candidates (" in line]
    assert len(within) >= 10
    assert any(" left" in line and "/s)" in line for line in within)


def test_a_batch_on_a_cpu_is_bounded_by_the_work_that_it_is(
    generator: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D8c: 65,536 tokens of an LLM of half a billion parameters take a CPU minutes for each token that they get."""
    monkeypatch.setattr(generator, "device", torch.device("cpu"))
    assert generator._batch_tokens() == generator.BATCH_TOKENS, "a small LLM has whole batches"
    prompts = ["where is the dog", "the cat", "one", "two"]
    decodings = parse_strategy("greedy+sampling2")
    whole = generator.respond(prompts, decodings, seed=0)
    calls: list[int] = []
    encode = generator._encode

    def counted(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(rows))
        return encode(rows)

    monkeypatch.setattr(generator, "_encode", counted)
    monkeypatch.setattr(local, "MAX_CPU_WORK", 1)
    alone = generator.respond(prompts, decodings, seed=0)
    assert calls == [1, 1, 1, 1]
    assert [[[one.tokens for one in own] for own in drawn] for drawn in alone] == [
        [[one.tokens for one in own] for own in drawn] for drawn in whole
    ]


class Busy(Model):
    """Refuses the first two requests, and repeats the key as some servers do."""

    def reply(self, body: dict[str, Any], key: str, path: str) -> tuple[int, dict[str, Any]]:
        status, answer = super().reply(body, key, path)
        if len(self.asked) > 2:
            return status, answer
        return 429, {"error": {"message": f"slow down,\n{key}"}}


def test_the_last_error_of_an_endpoint_is_in_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-that-is-secret")
    write(tmp_path / "in", [Instance(instance_id="1", instruction="say", references=("x",))])
    progress = Records()
    with serving(Busy()) as url:
        config = SamplingConfig(
            source=tmp_path / "in",
            target=tmp_path / "out",
            generator=(f"openai:m@{url}",),
            concurrency=1,
            work=tmp_path / "work",
        )
        run(config, progress)
    assert any("0 of 1 instances, last error: 429 slow down, ***" in line for line in progress.lines)
    assert "2 errors" in progress.lines[-1]
    assert not [line for line in progress.lines if "secret" in line or "\n" in line]


def test_an_error_is_shown_until_the_endpoint_has_answered_for_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = UsageMeter(EndpointConfig())
    assert meter.usage.last_error == ""
    meter.add_error("503 loading")
    monkeypatch.setattr(limits, "ERROR_SECONDS", 0.0)
    assert meter.usage.last_error == "503 loading"
    meter.add(requests=1, output_tokens=3)
    assert (meter.usage.last_error, meter.usage.errors) == ("", 1)
    monkeypatch.setattr(limits, "ERROR_SECONDS", 600.0)
    assert meter.usage.last_error == "503 loading"
    monkeypatch.setattr(limits, "ERROR_SECONDS", 0.0)
    meter.add_error("429 slow down")
    assert (meter.usage.last_error, meter.usage.errors) == ("429 slow down", 2)
