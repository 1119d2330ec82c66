"""The jax strategy, on a CPU that stands for eight chips. No TPU was ever used.

The tests proper lie in tests/training/tpu and run in a process of their own, because JAX fixes the number of devices
when it starts, and because a process that has used JAX must not fork, as other tests do. By hand:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python -m pytest -o pythonpath="tests/fakes tests/training/tpu" tests/training/tpu/parity.py
"""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cappy

HERE = Path(__file__).parent / "tpu"
ROOT = Path(cappy.__file__).parents[1]
# Unoptimized code: compiling takes a third of the time, and these models are too small to be slow.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
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
@pytest.mark.parametrize("name", ["parity", "shapes", "mesh", "fitting"])
def test_jax_trains_as_torch_does(name: str, environment: dict[str, str]) -> None:
    fakes = Path(__file__).parents[1] / "fakes"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={fakes} {HERE}"]
    done = subprocess.run(
        [*command, str(HERE / f"{name}.py")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
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


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names
