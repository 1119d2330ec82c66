"""The strategy jax, on a CPU that stands for eight devices. No TPU was ever used.

The tests that run JAX lie in tests/training/tpu and run in a process of their own, because a process that has used JAX
must not fork, as other tests do. By hand:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python -m pytest -o pythonpath="tests/fakes tests/training/tpu" tests/training/tpu/passes.py
"""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from wording import raises_naming

import cappy
from cappy.errors import ConfigError
from cappy.training.finetuning import FinetuningConfig, run

Plan = Callable[..., FinetuningConfig]
HERE = Path(__file__).parent / "tpu"
ROOT = Path(cappy.__file__).parents[1]
# Unoptimized code: compiling takes a third of the time, and these models are too small to be slow.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FLAGS = f"--xla_force_host_platform_device_count=8 {FAST}"
MISSING = [name for name in ("jax", "optax") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Eight devices on the CPU, and a folder where compiled programs wait for the next test that needs them."""
    return {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (the extra tpu)")
@pytest.mark.timeout(600)
def test_jax_trains_as_torch_does(environment: dict[str, str]) -> None:
    paths = f"pythonpath={HERE.parents[1] / 'fakes'} {HERE}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", paths, "--durations=5"]
    files = [str(HERE / "passes.py"), str(HERE / "runs.py")]
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_jax_is_imported_in_its_own_package_alone() -> None:
    package = ROOT / "cappy" / "training" / "tpu"
    users = {path for path in (ROOT / "cappy").rglob("*.py") if {"jax", "optax"} & _imported(path)}
    assert users
    assert all(path.parent == package and path.name != "__init__.py" for path in users)
    loaded = "import sys, cappy.training, cappy.training.tpu; print({'jax', 'optax', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_jax_the_extra_is_named(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    with raises_naming(ConfigError, "--parallelism jax:", "pip install 'cappy-scorer[tpu]'"):
        run(plan(parallelism="jax"))


def test_several_machines_and_processes_are_refused_in_one_line(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_naming(ConfigError, "--parallelism jax:", "one machine", "2 were requested", "ddp"):
        run(plan(parallelism="jax", nodes=2))
    pools = '{"workerpool0": ["first:2222"], "workerpool1": ["second:2222"]}'
    with monkeypatch.context() as patch:
        patch.setenv("CLUSTER_SPEC", f'{{"cluster": {pools}, "task": {{"type": "workerpool0", "index": 0}}}}')
        with raises_naming(ConfigError, "--parallelism jax:", "one machine", "2 were requested", "ddp"):
            run(plan(parallelism="jax"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with raises_naming(ConfigError, "--parallelism jax:", "one process", "without torchrun"):
        run(plan(parallelism="jax"))


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_a_machine_without_tpus_has_none() -> None:
    from cappy.training.tpu.strategy import count_tpus

    assert count_tpus() == 0
