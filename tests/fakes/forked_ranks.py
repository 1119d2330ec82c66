"""Training processes that one process forks: torch, transformers and DeepSpeed are imported once and not by each.

A process runs `cappy.training` as its main module, as torchrun and a CustomJob start it. How Cappy starts ranks of its
own (`cappy.training.launch`) stays as it is: those are new interpreters.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from processes import free_port
from waiting import wait_until

ROOT = str(Path(__file__).resolve().parents[2])
GRACE_SECONDS = 10.0
"""How long the others of a group may go on when one has ended badly."""


class Group:
    """Processes that were started together; `wait` gives their statuses, the number of a signal as its negative."""

    def __init__(self, pids: Sequence[int], log: Path) -> None:
        self.pids, self.log = pids, log

    @property
    def text(self) -> str:
        """What they wrote."""
        return self.log.read_text()

    def ended(self) -> list[int]:
        """The statuses, once all have ended; none before."""
        path = self.log.with_suffix(".json")
        statuses: list[int] = json.loads(path.read_text()) if path.exists() else []
        return statuses

    def wait(self, seconds: float = 200) -> list[int]:
        return wait_until(self.ended, f"the end of {self.pids}", seconds=seconds, details=lambda: self.text)


class Ranks:
    """Starts groups of processes."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self.server, self.folder, self.count = server, folder, 0

    def start(self, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], before: str = "") -> Group:
        """`python -m cappy.training ARGUMENTS` once per environment, which each adds to its own.

        `before` is code that each runs first.
        """
        assert self.server.stdin
        assert self.server.stdout
        self.count += 1
        log = self.folder / f"{self.count}.log"
        asked = {"arguments": arguments, "environments": environments, "before": before, "log": str(log)}
        self.server.stdin.write(f"{json.dumps(asked)}\n")
        self.server.stdin.flush()
        return Group(json.loads(self.server.stdout.readline()), log)

    def train(self, settings: Mapping[str, Any], count: int = 2, before: str = "") -> tuple[list[int], str]:
        """Statuses and words of so many ranks that finetune together."""
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        group = self.start(("finetuning", json.dumps(settings)), ranks, before)
        return group.wait(), group.text


@contextmanager
def forked_ranks(folder: Path, environment: Mapping[str, str]) -> Iterator[Ranks]:
    """What forks; its processes end with the block."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((ROOT, str(Path(__file__).parent))), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Ranks(server, folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


def fork(asked: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """The process id of a child that trains."""
    if pid := os.fork():
        return pid
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, descriptor)
        os.environ.update(environment)
        sys.argv = ["cappy.training", *asked["arguments"]]
        exec(asked["before"], {})
        runpy.run_module("cappy.training", run_name="__main__", alter_sys=True)
    except BaseException:  # noqa: BLE001 (shown, as the interpreter would)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(70)  # `cappy.training` ends its process itself: this one failed before it could.


def follow(groups: list[tuple[dict[int, int | None], Path, list[float]]]) -> None:
    """Notes how processes ended, and ends those that wait for one which failed."""
    for statuses, log, failed in list(groups):
        for pid in [pid for pid, status in statuses.items() if status is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if not failed and any(statuses.values()):
            failed.append(time.monotonic())
        left = [pid for pid, status in statuses.items() if status is None]
        if not left:
            whole = log.with_suffix(".part")
            whole.write_text(json.dumps(list(statuses.values())))
            whole.rename(log.with_suffix(".json"))
            groups.remove((statuses, log, failed))
        elif failed and time.monotonic() - failed[0] > GRACE_SECONDS:
            for pid in left:
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    import importlib.util
    import select

    from cappy.training import train  # noqa: F401 (imported for the children, as are the next)
    from cappy.training.deepspeed import set_accelerator

    set_accelerator()
    if importlib.util.find_spec("deepspeed"):
        # Every engine imports it at its start; it loads torch's compiler.
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

    groups: list[tuple[dict[int, int | None], Path, list[float]]] = []
    while True:
        if select.select([sys.stdin], [], [], 0.05 if groups else None)[0]:
            line = sys.stdin.readline()
            if not line:  # Whoever asks is gone.
                os.killpg(0, signal.SIGKILL)
            asked = json.loads(line)
            pids = [fork(asked, environment) for environment in asked["environments"]]
            sys.stdout.write(f"{json.dumps(pids)}\n")
            sys.stdout.flush()
            groups.append((dict.fromkeys(pids), Path(asked["log"]), []))
        follow(groups)


if __name__ == "__main__":
    main()
