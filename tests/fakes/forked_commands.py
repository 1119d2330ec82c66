"""`cappy VERB ...` in a child of a process that has imported torch already, which takes longer than many verbs."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cappy.cli", "cappy.scoring.scorer", "cappy.training.train"])


def run_cappy(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], data: bytes, *, seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """Runs the verb in `folder` with `data` on its standard input; its files are `forked.*` there."""
    names = [folder / f"forked.{name}" for name in ("stdin", "stdout", "stderr")]
    names[0].write_bytes(data)
    process = _CONTEXT.Process(target=_run, args=(list(words), [*map(str, names)], str(folder), dict(environment)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(list(words), seconds)
    return subprocess.CompletedProcess(list(words), process.exitcode or 0, names[1].read_bytes(), names[2].read_bytes())


def _run(words: list[str], names: list[str], folder: str, environment: dict[str, str]) -> None:
    for descriptor, (name, mode) in enumerate(zip(names, ("rb", "wb", "wb"), strict=True)):
        with open(name, mode) as file:  # noqa: PTH123
            os.dup2(file.fileno(), descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0, encoding="utf-8"), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    from cappy.cli import main

    main(words)
