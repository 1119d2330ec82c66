"""The command line, as a process of its own and in this one."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Cappy = Callable[..., subprocess.CompletedProcess[str]]

COMMAND = (sys.executable, "-c", "from cappy.cli import main; main()")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """This process's environment with one thread and no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def command() -> tuple[str, ...]:
    """The words that start the command line, for tests that drive the process themselves."""
    return COMMAND


@pytest.fixture
def cappy(environment: dict[str, str], tmp_path: Path) -> Cappy:
    """`cappy(*arguments, input=...)`: a finished process, run in an empty folder."""

    def run(*arguments: str | Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
        words = [*COMMAND, *map(str, arguments)]
        return subprocess.run(words, input=input, env=environment, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.fixture
def flag_rows() -> Callable[[str], dict[str, str]]:
    """`flag_rows(help)`: what a help page says of each long flag, its lines joined."""

    def rows(text: str) -> dict[str, str]:
        result: dict[str, str] = {}
        for row in re.split(r"\n  (?=-)", "\n" + text.split("Options:\n")[1].split("\n\n")[0])[1:]:
            match = re.match(r"(?:-\w, )?(--[\w-]+)(.*)", " ".join(row.split()))
            assert match, row
            result[match[1]] = match[2]
        return result

    return rows


@pytest.fixture
def here(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cappy:
    """As `cappy`, in this process, without the seconds that imports take."""
    from cappy.cli import main

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        written = capfdbinary.readouterr()
        status = int(ended.value.code or 0)
        return subprocess.CompletedProcess(arguments, status, written.out.decode(), written.err.decode())

    return run
