"""Children are small, know nothing of their parent, hold their limits, and never outlive it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from cappy.rendering import jobs
from cappy.rendering.jobs import Failure, RenderJob, TemplateSource
from cappy.rendering.process import ChildExitError, Process

needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which Linux alone has")
HELLO = TemplateSource("promptsource", ("Hello {{name}} ||| y", ""))
SLEEPY = TemplateSource("promptsource", ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3 + " ||| y", ""))


def hello(name: str) -> RenderJob:
    return RenderJob(values=json.dumps({"name": name}), items=((HELLO, "0"),))


@pytest.fixture
def child() -> Iterator[Process]:
    process = Process("promptsource")
    yield process
    process.close()


@needs_proc
def test_a_child_has_nothing_of_the_environment_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    process = Process("promptsource")
    folder = Path(f"/proc/{process.pid}")
    try:
        assert (folder / "environ").read_bytes() in (b"", f"TZ={os.environ.get('TZ')}\0".encode())
        loaded = (folder / "maps").read_text()
        assert not [name for name in ("numpy", "pyarrow", "torch", "pydantic", "yaml") if f"/{name}/" in loaded]
        assert int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") < 60 * 2**20
    finally:
        process.close()


@needs_proc
def test_a_child_has_its_limits_and_no_file_but_its_pipes(child: Process) -> None:
    folder = Path(f"/proc/{child.pid}")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (folder / "limits").read_text().splitlines()[1:]}
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert limits["Max processes"] == ["0", "0"]
    assert limits["Max open files"] == ["16", "16"]
    assert int(limits["Max address space"][1]) < 2**30
    files = sorted(str(file.readlink()).partition(":")[0] for file in (folder / "fd").iterdir())
    assert files == ["/dev/null", "/dev/null", "/dev/null", "pipe", "pipe"]


def test_a_child_that_is_closed_is_gone_and_no_zombie(child: Process) -> None:
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    child.close()
    with pytest.raises(ChildExitError):
        child.receive(1)


def test_a_child_is_reused() -> None:
    first = [process.pid for process in children_of([hello("a")])]
    assert [process.pid for process in children_of([hello("b")])] == first


def test_children_that_were_closed_are_not_idle() -> None:
    closed = {process.pid for process in children_of([hello("a")])}
    jobs.close_children()
    after = children_of([hello("b")])
    assert after
    assert not closed & {process.pid for process in after}


def test_a_child_that_ended_while_it_was_idle_is_replaced() -> None:
    for process in children_of([hello("a")]):
        os.kill(process.pid, signal.SIGKILL)
    assert list(jobs.run("promptsource", [hello("b"), hello("c")])) == [
        [["Hello b", "y", []]],
        [["Hello c", "y", []]],
    ]


def test_a_child_that_answers_nonsense_costs_the_job_that_it_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([b"[]", b"{", b"[" * 99999, b'"\xff"', b"[1, 2]"])
    real = Process.receive

    def receive(process: Process, seconds: float) -> bytes:
        line = real(process, seconds)
        return next(answers, line) if b"Hello" in line else line

    monkeypatch.setattr(Process, "receive", receive)
    assert list(jobs.run("promptsource", [hello("b")])) == [
        [Failure("its process sent an invalid answer", exceeded_limit=True)],
    ]


def test_threads_have_children_of_their_own() -> None:
    result: list[list[object]] = []

    def many(name: str) -> None:
        result.extend(jobs.run("promptsource", (hello(name) for _ in range(200))))

    threads = [threading.Thread(target=many, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [str(one) for one in result]
    assert len(texts) == 800
    assert all(texts.count(f"[['Hello {name}', 'y', []]]") == 200 for name in "abcd")


def test_jobs_may_ask_for_other_jobs_while_they_run() -> None:
    outer = jobs.run("promptsource", (hello(str(number)) for number in range(100)))
    for number, outcome in enumerate(outer):
        assert outcome == [[f"Hello {number}", "y", []]]
        assert list(jobs.run("promptsource", [hello("in")])) == [[["Hello in", "y", []]]]


TESTS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "fakes")]
FORK = """
import os, sys
sys.path[:0] = {tests!r}
from test_children import *
running = jobs.run("promptsource", (hello(str(number)) for number in range(100)))
first = next(running)
pid = os.fork()
rest = [first, *running]
assert rest == [[[f"Hello {{number}}", "y", []]] for number in range(100)], rest
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print("both")
"""


def test_a_fork_goes_on_with_children_of_its_own() -> None:
    code = FORK.format(tests=TESTS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("both\n", "", 0)


PARENT = """
import os, sys
sys.path[:0] = {tests!r}
from test_children import *
from cappy.rendering import process
running = jobs.run("promptsource", [hello("a"), *[RenderJob(items=((SLEEPY, "0"),), seconds=1.0)] * 99])
next(running)
print(*(child.pid for child in process._processes), flush=True)
for _ in running:
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_child_dies_with_its_parent(number: signal.Signals) -> None:
    code = PARENT.format(tests=TESTS)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        parent.send_signal(number)
        assert parent.wait(60) != 0
    wait_until(lambda: not any(map(runs, pids)), f"the end of {pids}")


def test_an_interpreter_that_ends_leaves_no_child_and_no_word() -> None:
    code = PARENT.format(tests=TESTS).partition("for _ in")[0]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stderr, done.returncode) == ("", 0)
    wait_until(lambda: not any(runs(int(pid)) for pid in done.stdout.split()), f"the end of {done.stdout}")


def children_of(work: list[RenderJob]) -> list[Process]:
    """The idle children after this work; they were idle before."""
    list(jobs.run("promptsource", work))
    return list(jobs._idle["promptsource"])


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
