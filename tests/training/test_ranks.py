"""Ranks that train together compute what one process computes, however they are started and ended."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from waiting import wait_until
from wording import assert_names, raises_naming

from cappy.config import encode, to_values
from cappy.errors import ConfigError, TrainingError
from cappy.records import read_manifest
from cappy.records.folder import verify
from cappy.scoring import Scorer
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.launch import Topology, topology

Plan = Callable[..., FinetuningConfig]
CURVE = {"checks": 1000, "patience": 1000, "epochs": 1.5}
"""A check after every update, so that the log is the loss curve; 12 updates."""

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'cappy-scorer[train]'",
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of two threads each would fight for the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def curve(plan: FinetuningConfig) -> list[float]:
    return [entry["loss"] for entry in json.loads((plan.target / "training.json").read_text())["curve"]]


def furthest(first: FinetuningConfig, second: FinetuningConfig, *, left_out: str = " ") -> float:
    one, two = (load_file(plan.target / "model.safetensors") for plan in (first, second))
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one if not name.endswith(left_out))


NOISE = "attention.self.key.bias"
"""Softmax does not change with it, so its gradient is rounding alone, which Adam scales up to whole steps."""


def test_two_ranks_compute_what_one_process_does_dropout_included(plan: Plan) -> None:
    run(plan("one", **CURVE))
    run(plan("two", parallelism="ddp", devices=2, **CURVE))
    assert curve(plan("two")) == pytest.approx(curve(plan("one")), abs=1e-4)
    assert len(curve(plan("one"))) == 12
    one, two = (verify(plan(name).target) for name in ("one", "two"))
    assert [file.name for file in one.files] == [file.name for file in two.files]
    assert (one.config, one.parents, one.step_version) == (two.config, two.parents, two.step_version)
    pairs = [("1 cat dog mat red", word) for word in ("red", "dog")]
    scores = [Scorer.load(str(plan(name).target), precision="fp32").score(pairs) for name in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_computes_what_one_process_does(stage: int, plan: Plan) -> None:
    run(plan("one", **CURVE))
    run(plan("sharded", parallelism="deepspeed", devices=2, zero_stage=stage, **CURVE))
    assert curve(plan("sharded")) == pytest.approx(curve(plan("one")), abs=1e-4)
    assert max(curve(plan("one"))[1:]) - min(curve(plan("one"))[1:]) > 0.01, "or there was nothing to compare"


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_any_strategy_goes_on_where_another_stopped(stage: int, plan: Plan) -> None:
    run(plan("one", **CURVE))
    sharded = {"parallelism": "deepspeed", "devices": 2, "zero_stage": stage}
    for stop, spread in ((4, {}), (8, sharded)):
        with pytest.raises(StoppedError):
            run(plan("mixed", **spread, **CURVE), stop_after(stop))
    run(plan("mixed", parallelism="ddp", devices=2, **CURVE))
    assert curve(plan("mixed")) == pytest.approx(curve(plan("one")), abs=1e-4)
    assert furthest(plan("one"), plan("mixed"), left_out=NOISE) < 1e-4


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_goes_on_to_the_same_bits(stage: int, plan: Plan) -> None:
    settings = {"parallelism": "deepspeed", "devices": 2, "zero_stage": stage, **CURVE}
    run(plan("unbroken", **settings))
    with pytest.raises(StoppedError):
        run(plan("b", **settings), stop_after(5))
    run(plan("b", **settings))
    assert furthest(plan("unbroken"), plan("b")) == 0.0


OUT_OF_MEMORY = """
import os

if os.environ.get("RANK") == "1":
    from cappy.scoring.scorer import Scorer

    calls, plain = [], Scorer.logits

    def logits(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise MemoryError
        return plain(self, batch)

    Scorer.logits = logits
"""
"""A module that Python imports at every start, before the rank does: the second rank fails once."""


@pytest.fixture
def short_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    paths = [str(tmp_path / "start"), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.usefixtures("short_of_memory")
def test_when_memory_runs_out_on_one_rank_all_halve_their_budget_and_go_on(plan: Plan) -> None:
    run(plan("one", **CURVE))
    short = plan("short", parallelism="ddp", devices=2, batch_tokens=4096, **CURVE)
    run(short)
    log = json.loads((short.target / "training.json").read_text())
    (event,) = log["events"]
    assert_names(event, "update ", "memory", "2048 tokens per pass")
    assert curve(short) == pytest.approx(curve(plan("one")), abs=1e-4)
    assert len(curve(short)) == 12


@needs_deepspeed
@pytest.mark.usefixtures("short_of_memory")
def test_deepspeed_ends_in_one_line_where_memory_runs_out(plan: Plan) -> None:
    """Its ranks wait for each other within a pass, so one that gave up cannot tell the others."""
    with raises_naming(TrainingError, "memory", "4096 tokens per pass", "--batch-tokens"):
        run(plan("short", parallelism="deepspeed", devices=2, batch_tokens=4096, **CURVE))


@needs_deepspeed
def test_deepspeed_compiles_nothing_on_a_cpu(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that is killed leaves a lock that all later runs would wait for."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    run(plan(parallelism="deepspeed", epochs=0.2))
    assert not list((tmp_path / "extensions").rglob("*"))


class StoppedError(Exception):
    """Stands for the end of the process that started the ranks."""


def stop_after(update: int) -> Callable[..., None]:
    def progress(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        if unit == "updates" and done >= update:
            raise StoppedError

    return progress


def test_a_killed_rank_ends_all_and_the_run_goes_on_to_the_same_bits_and_on_one_rank_nearly(plan: Plan) -> None:
    settings = {"parallelism": "ddp", "devices": 2, **CURVE}
    run(plan("unbroken", **settings))
    killer = threading.Thread(target=kill_a_rank, args=(plan("b", **settings), 5))
    killer.start()
    with raises_naming(TrainingError, "rank 1", "signal 9", "same command"):
        run(plan("b", **settings))
    killer.join()
    shutil.copytree(plan("b").work, plan("c").work)
    run(plan("b", **settings))
    assert furthest(plan("unbroken"), plan("b")) == 0.0
    assert read_manifest(plan("unbroken").target).hash == read_manifest(plan("b").target).hash
    run(plan("c", **CURVE))
    assert furthest(plan("unbroken"), plan("c"), left_out=NOISE) < 1e-4


def ranks_of(parent: int) -> dict[int, int]:
    """Rank -> process id of the ranks that this process started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                environment = dict(
                    part.split("=", 1) for part in (folder / "environ").read_text().split("\0") if "=" in part
                )
                if "cappy.training" in (folder / "cmdline").read_text():
                    found[int(environment["RANK"])] = int(folder.name)
    return found


def kill_a_rank(plan: FinetuningConfig, update: int) -> None:
    wait_for_checkpoint(plan, update)
    os.kill(ranks_of(os.getpid())[1], signal.SIGKILL)


def wait_for_checkpoint(plan: FinetuningConfig, update: int) -> None:
    place = f"finetuning/*/.checkpoints/{update:09d}"
    wait_until(lambda: list(plan.work.glob(place)), f"checkpoint {update}", seconds=120)


@pytest.fixture
def parent(plan: Plan) -> Iterator["subprocess.Popen[str]"]:
    """A process that starts two ranks and trains for long."""
    settings = plan("long", parallelism="ddp", devices=2, epochs=500.0, patience=1000, checkpoint_updates=5)
    code = f"""
from cappy.config import build, decode
from cappy.errors import CappyError
from cappy.training.finetuning import FinetuningConfig, run
try:
    run(build(FinetuningConfig, decode({encode(to_values(settings))!r})))
except CappyError as error:
    print(error, flush=True)
"""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(settings, 5)
    yield process
    process.kill()
    process.communicate()


def test_ranks_die_with_the_process_that_started_them(parent: "subprocess.Popen[str]") -> None:
    ranks = ranks_of(parent.pid)
    assert set(ranks) == {0, 1}
    parent.kill()
    parent.wait()
    wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), f"the end of {ranks}", seconds=20
    )


def test_sigterm_reaches_the_ranks_which_write_a_checkpoint_and_end(parent: "subprocess.Popen[str]") -> None:
    parent.terminate()
    said, _ = parent.communicate(timeout=60)
    (line,) = said.splitlines()
    assert_names(line, "SIGTERM after update ", "same command")


def test_what_cannot_be_spread_is_refused_in_one_line(plan: Plan) -> None:
    with raises_naming(ConfigError, "--batch-instances 1:", "2 ranks", "--batch-instances 2"):
        run(plan(parallelism="ddp", devices=2, batch_instances=1))
    with raises_naming(ConfigError, "--parallelism single:", "2 were asked for", "ddp"):
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
    told = {"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    assert topology(plan(nodes=2), told) == Topology(1, 2, "first", 29500)
    with raises_naming(ConfigError, "CLUSTER_SPEC", "'{'", "Vertex AI"):
        topology(plan(), {"CLUSTER_SPEC": "{"})
    with raises_naming(ConfigError, "--nodes 4:", "of 3;"):
        topology(plan(nodes=4), {"CLUSTER_SPEC": json.dumps(CLUSTER)})


def test_the_command_of_a_vertex_job_trains_on_all_machines_together(plan: Plan) -> None:
    pytest.importorskip("google.cloud.aiplatform", reason="no Vertex AI SDK here: pip install 'cappy-scorer[gcp]'")
    from cappy.training.remote.vertex import worker_pools

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": [f"127.0.0.1:{port}"]}
    settings = plan("cluster", parallelism="ddp", nodes=2, **CURVE)
    pools: Any = worker_pools("finetuning", settings, image="image", machine_type="n1-standard-8")
    _, *words = pools[0]["container_spec"]["command"] + pools[0]["container_spec"]["args"]
    nodes = [
        subprocess.Popen(
            [sys.executable, *words],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "CLUSTER_SPEC": json.dumps({"cluster": cluster, "task": {"type": pool, "index": 0}}),
            },
        )
        for pool in cluster
    ]
    assert [node.wait(200) for node in nodes] == [0, 0]
    run(plan("one", **CURVE))
    assert curve(plan("cluster")) == pytest.approx(curve(plan("one")), abs=1e-4)
    assert torch.isfinite(torch.tensor(curve(plan("one")))).all()


def test_ranks_that_torchrun_started_train_together(plan: Plan) -> None:
    settings = plan("torchrun", parallelism="ddp", **CURVE)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cappy.training"]
    done = subprocess.run(
        [sys.executable, *command, "finetuning", json.dumps(to_values(settings))],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    run(plan("one", **CURVE))
    assert curve(settings) == pytest.approx(curve(plan("one")), abs=1e-4)


def test_ranks_tell_each_other_nothing_by_pickle() -> None:
    """Torch's collectives for objects pickle what they send; ours send JSON and tensors."""
    sources = (Path(__file__).parents[2] / "cappy").rglob("*.py")
    named = re.compile(r"\b(all_gather_object|gather_object|(broadcast|scatter|send|recv)_object_list)\b")
    assert not [path for path in sources if named.search(path.read_text(encoding="utf-8"))]
