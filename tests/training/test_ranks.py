"""Ranks that train together compute what one process computes, however they are started and ended."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import Group, Ranks, forked_ranks
from processes import free_port
from safetensors.torch import load_file
from waiting import wait_until
from wording import assert_names, raises_naming

from cappy.config import to_values
from cappy.errors import ConfigError, TrainingError
from cappy.records import read_manifest
from cappy.records.folder import verify
from cappy.scoring import Scorer
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.launch import REPORT_VARIABLE, Topology, must_launch, topology

ROOT = str(Path(__file__).parents[2])
Plan = Callable[..., FinetuningConfig]
CURVE = {"checks": 1000, "patience": 1000, "epochs": 1.5, "checkpoint_updates": 6, "clip": 50.0}
"""A check after every update, so that the log is the loss curve; 12 updates, of which half are clipped.

Were all clipped or none, AdamW would hide a wrong scale of the gradients."""
EVERY_UPDATE = {**CURVE, "checkpoint_updates": 1}
"""The same run, to be broken off anywhere: gathering a checkpoint takes DeepSpeed longer than an update."""

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'cappy-scorer[train]'",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two ranks of two threads each would fight for the cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all forked ranks would compile what they need."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, extensions: Path) -> Iterator[Ranks]:
    """Ranks that are forked, for what does not depend on how Cappy starts them."""
    changed = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    with forked_ranks(tmp_path_factory.mktemp("ranks"), changed) as made:
        yield made


@pytest.fixture(scope="module")
def one(shared_plan: Plan) -> FinetuningConfig:
    """What one process trained."""
    config = shared_plan("one", **CURVE)
    run(config)
    return config


@pytest.fixture(scope="module")
def two(shared_plan: Plan) -> FinetuningConfig:
    """What two ranks trained that Cappy started."""
    config = shared_plan("two", parallelism="ddp", devices=2, **CURVE)
    run(config)
    return config


@pytest.fixture(scope="module")
def sharded(shared_plan: Plan, ranks: Ranks) -> Callable[[int], FinetuningConfig]:
    """sharded(stage) -> what two ranks trained with DeepSpeed, each stage once."""

    @cache
    def trained(stage: int) -> FinetuningConfig:
        config = shared_plan(f"stage{stage}", **deepspeed(stage))
        train(ranks, config)
        return config

    return trained


def deepspeed(stage: int) -> dict[str, object]:
    return {"parallelism": "deepspeed", "devices": 2, "zero_stage": stage, **CURVE}


def train(ranks: Ranks, config: FinetuningConfig, before: str = "", ended: int = 0) -> None:
    """Trains on forked ranks, each of which ends with this status."""
    statuses, text = ranks.train(to_values(config), config.devices, before)
    assert statuses == [ended] * config.devices, text


BREAK_OFF = """
import os, signal
from cappy.training.loop import TrainingRun

save = TrainingRun.save_if_due

def save_if_due(self, shutdown):
    save(self, shutdown)
    if self.state.update == {update}:
        os.kill(os.getpid(), signal.SIGKILL)

TrainingRun.save_if_due = save_if_due
"""
"""Every rank is killed when this update and its checkpoint are done."""


def break_off(ranks: Ranks, config: FinetuningConfig, update: int) -> None:
    kept = replace(config, checkpoint_updates=1)
    train(ranks, kept, BREAK_OFF.format(update=update), -signal.SIGKILL)
    assert not config.target.exists()


def curve(plan: FinetuningConfig) -> list[float]:
    return [entry["loss"] for entry in json.loads((plan.target / "training.json").read_text())["curve"]]


def furthest(first: FinetuningConfig, second: FinetuningConfig, *, left_out: str = " ") -> float:
    one, two = (load_file(plan.target / "model.safetensors") for plan in (first, second))
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one if not name.endswith(left_out))


NOISE = "attention.self.key.bias"
"""Softmax does not change with it, so its gradient is rounding alone, which Adam scales up to whole steps."""


def test_two_ranks_compute_what_one_process_does_dropout_included(one: FinetuningConfig, two: FinetuningConfig) -> None:
    assert curve(two) == pytest.approx(curve(one), abs=1e-4)
    assert len(curve(one)) == 12
    assert max(curve(one)[1:]) - min(curve(one)[1:]) > 0.01, "or there was nothing to compare"
    first, second = (verify(config.target) for config in (one, two))
    assert [file.name for file in first.files] == [file.name for file in second.files]
    assert (first.config, first.parents, first.step_version) == (second.config, second.parents, second.step_version)
    pairs = [("1 cat dog mat red", word) for word in ("red", "dog")]
    scores = [Scorer.load(str(config.target), precision="fp32").score(pairs) for config in (one, two)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_computes_what_one_process_does(
    stage: int, one: FinetuningConfig, sharded: Callable[[int], FinetuningConfig]
) -> None:
    assert curve(sharded(stage)) == pytest.approx(curve(one), abs=1e-4)


@needs_deepspeed
def test_any_strategy_goes_on_where_another_stopped(one: FinetuningConfig, plan: Plan, ranks: Ranks) -> None:
    with pytest.raises(StoppedError):
        run(plan("mixed", **EVERY_UPDATE), stop_after(2))
    for stage, update in ((1, 5), (3, 8)):
        break_off(ranks, plan("mixed", **deepspeed(stage)), update)
    train(ranks, plan("mixed", parallelism="ddp", devices=2, **CURVE))
    assert curve(plan("mixed")) == pytest.approx(curve(one), abs=1e-4)
    assert furthest(one, plan("mixed"), left_out=NOISE) < 1e-4


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_goes_on_to_the_same_bits(
    stage: int, plan: Plan, ranks: Ranks, sharded: Callable[[int], FinetuningConfig]
) -> None:
    break_off(ranks, plan("b", **deepspeed(stage)), 5)
    train(ranks, plan("b", **deepspeed(stage)))
    assert furthest(sharded(stage), plan("b")) == 0.0


OUT_OF_MEMORY = """
import os

if os.environ.get("RANK") == "1":
    from cappy.scoring.scorer import Scorer

    calls, plain = [], Scorer.training_logits

    def training_logits(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise MemoryError
        return plain(self, batch)

    Scorer.training_logits = training_logits
"""
"""The second rank fails once."""


@pytest.fixture
def short_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python imports this module at every start, before the rank does what it is for."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    paths = [str(tmp_path / "start"), ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_when_memory_runs_out_on_one_rank_all_halve_their_budget_and_go_on(
    one: FinetuningConfig, plan: Plan, ranks: Ranks
) -> None:
    short = plan("short", parallelism="ddp", devices=2, batch_tokens=4096, **CURVE)
    train(ranks, short, OUT_OF_MEMORY)
    log = json.loads((short.target / "training.json").read_text())
    (event,) = log["events"]
    assert_names(event, "update ", "memory", "2048 tokens per pass")
    assert curve(short) == pytest.approx(curve(one), abs=1e-4)
    assert len(curve(short)) == 12


@needs_deepspeed
@pytest.mark.usefixtures("short_of_memory")
def test_deepspeed_ends_in_one_line_where_memory_runs_out(plan: Plan) -> None:
    """Its ranks wait for each other within a pass, so one that gave up cannot tell the others."""
    with raises_naming(TrainingError, "memory", "4096 tokens per pass", "--batch-tokens"):
        run(plan("short", parallelism="deepspeed", devices=2, batch_tokens=4096, **CURVE))


@needs_deepspeed
def test_deepspeed_wants_a_rank_where_there_is_one_and_compiles_nothing_on_a_cpu(
    plan: Plan, ranks: Ranks, extensions: Path
) -> None:
    """A build that is killed leaves a lock that all later runs would wait for."""
    assert must_launch(plan(parallelism="deepspeed"))
    train(ranks, plan(parallelism="deepspeed", epochs=0.2))
    assert verify(plan().target).metrics["updates"] == 2
    assert not list(extensions.rglob("*"))


class StoppedError(Exception):
    """Stands for the end of the process that started the ranks."""


def stop_after(update: int) -> Callable[..., None]:
    def progress(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        if unit == "updates" and done >= update:
            raise StoppedError

    return progress


def test_a_killed_rank_ends_all_and_the_run_goes_on_to_the_same_bits_and_on_one_rank_nearly(
    two: FinetuningConfig, plan: Plan, ranks: Ranks
) -> None:
    settings = {"parallelism": "ddp", "devices": 2, **EVERY_UPDATE}
    killer = threading.Thread(target=kill_a_rank, args=(plan("b", **settings), 5))
    killer.start()
    with raises_naming(TrainingError, "rank 1", "signal 9", "same command"):
        run(plan("b", **settings))
    killer.join()
    shutil.copytree(plan("b").work, plan("c").work)
    train(ranks, plan("b", **settings))
    assert furthest(two, plan("b")) == 0.0
    assert read_manifest(two.target).hash == read_manifest(plan("b").target).hash
    run(plan("c", **CURVE))
    assert furthest(two, plan("c"), left_out=NOISE) < 1e-4


def ranks_of(parent: int) -> dict[int, int]:
    """Rank -> process id of the ranks that this process started."""
    result = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                environment = dict(
                    part.split("=", 1) for part in (folder / "environ").read_text().split("\0") if "=" in part
                )
                if "cappy.training" in (folder / "cmdline").read_text():
                    result[int(environment["RANK"])] = int(folder.name)
    return result


def kill_a_rank(plan: FinetuningConfig, update: int) -> None:
    wait_for_checkpoint(plan, update)
    os.kill(ranks_of(os.getpid())[1], signal.SIGKILL)


def wait_for_checkpoint(plan: FinetuningConfig, update: int) -> None:
    place = f"finetuning/*/.checkpoints/{update:09d}"
    wait_until(lambda: list(plan.work.glob(place)), f"checkpoint {update}", seconds=120)


@pytest.fixture
def parent(plan: Plan, ranks: Ranks) -> Group:
    """A process that has started two ranks, which train for long."""
    config = plan("long", parallelism="ddp", devices=2, epochs=500.0, patience=1000, checkpoint_updates=5)
    started = ranks.start(("finetuning", json.dumps(to_values(config))), [{}])
    wait_for_checkpoint(config, 5)
    return started


def test_ranks_die_with_the_process_that_started_them(parent: Group) -> None:
    (process,) = parent.pids
    own = ranks_of(process)
    assert set(own) == {0, 1}
    os.kill(process, signal.SIGKILL)
    assert parent.wait() == [-signal.SIGKILL]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in own.values()), f"the end of {own}", seconds=20)


def test_a_rank_that_reports_nothing_ends_with_its_parent_too() -> None:
    """One that reports would end anyhow, by the broken pipe."""
    blocked = "import sys, time, cappy.training.__main__ as rank; rank._run = lambda *_: time.sleep(60); rank.main([])"
    report_reader, report_writer = os.pipe()
    alive_reader, alive_writer = os.pipe()
    rank = subprocess.Popen(
        [sys.executable, "-c", blocked],
        env={**os.environ, "PYTHONPATH": ROOT, REPORT_VARIABLE: f"{report_writer},{alive_reader}"},
        pass_fds=(report_writer, alive_reader),
    )
    try:
        os.close(alive_writer)
        assert rank.wait(20) == -signal.SIGKILL
    finally:
        rank.kill()
        rank.wait()
        for descriptor in (report_reader, report_writer, alive_reader):
            os.close(descriptor)


def test_sigterm_reaches_the_ranks_which_write_a_checkpoint_and_end(parent: Group) -> None:
    os.kill(parent.pids[0], signal.SIGTERM)
    assert parent.wait(60) == [1]
    (line,) = parent.text.splitlines()
    assert_names(line, "SIGTERM after update ", "same command")


def test_what_cannot_be_spread_is_refused_in_one_line(plan: Plan) -> None:
    with raises_naming(ConfigError, "--batch-instances 1:", "2 ranks", "--batch-instances 2"):
        run(plan(parallelism="ddp", devices=2, batch_instances=1))
    with raises_naming(ConfigError, "--parallelism single:", "2 were requested", "ddp"):
        run(plan(parallelism="single", devices=2))
    with raises_naming(ConfigError, "--nodes 2:", "torchrun", "NODE_RANK"):
        run(plan(nodes=2))


CLUSTER = {
    "cluster": {"workerpool0": ["first:2222"], "workerpool1": ["second:2222", "third:2222"], "workerpool2": ["r:1"]},
    "task": {"type": "workerpool1", "index": 1},
}


def test_the_place_of_a_machine_is_read_from_what_the_platform_tells(plan: Plan) -> None:
    assert topology(plan(), {}) == Topology()
    assert topology(plan(nodes=3), {"CLUSTER_SPEC": json.dumps(CLUSTER)}) == Topology(2, 3, "first", 2222)
    assert topology(plan(), {"CLUSTER_SPEC": json.dumps(CLUSTER)}).nodes == 3
    alone = {"cluster": {"workerpool0": ["first:2222"]}, "task": {"type": "workerpool0", "index": 0}}
    assert topology(plan(), {"CLUSTER_SPEC": json.dumps(alone)}) == Topology()
    actual = {"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    assert topology(plan(nodes=2), actual) == Topology(1, 2, "first", 29500)
    with raises_naming(ConfigError, "CLUSTER_SPEC", "'{'", "Vertex AI"):
        topology(plan(), {"CLUSTER_SPEC": "{"})
    with raises_naming(ConfigError, "--nodes 4:", "3 machines;"):
        topology(plan(nodes=4), {"CLUSTER_SPEC": json.dumps(CLUSTER)})


def test_the_command_of_a_vertex_job_trains_on_all_machines_together(
    one: FinetuningConfig, plan: Plan, ranks: Ranks
) -> None:
    pytest.importorskip("google.cloud.aiplatform", reason="no Vertex AI SDK here: pip install 'cappy-scorer[gcp]'")
    from cappy.training.remote.vertex import worker_pools

    port = free_port()
    cluster = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": [f"127.0.0.1:{port}"]}
    settings = plan("cluster", parallelism="ddp", nodes=2, **CURVE)
    pools: Any = worker_pools("finetuning", settings, image="image", machine_type="n1-standard-8")
    command = [*pools[0]["container_spec"]["command"], *pools[0]["container_spec"]["args"]]
    assert command[:3] == ["python", "-m", "cappy.training"]
    machines = [
        {"CLUSTER_SPEC": json.dumps({"cluster": cluster, "task": {"type": pool, "index": 0}})} for pool in cluster
    ]
    group = ranks.start(command[3:], machines)
    assert group.wait() == [0, 0], group.text
    assert curve(settings) == pytest.approx(curve(one), abs=1e-4)
    assert torch.isfinite(torch.tensor(curve(one))).all()


def test_ranks_that_torchrun_started_train_together(one: FinetuningConfig, plan: Plan) -> None:
    settings = plan("torchrun", parallelism="ddp", **CURVE)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cappy.training"]
    done = subprocess.run(
        [sys.executable, *command, "finetuning", json.dumps(to_values(settings))],
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert curve(settings) == pytest.approx(curve(one), abs=1e-4)


def test_ranks_tell_each_other_nothing_by_pickle() -> None:
    """Torch's collectives for objects pickle what they send; ours send JSON and tensors."""
    sources = Path(ROOT, "cappy").rglob("*.py")
    named = re.compile(r"\b(all_gather_object|gather_object|(broadcast|scatter|send|recv)_object_list)\b")
    assert not [path for path in sources if named.search(path.read_text(encoding="utf-8"))]
