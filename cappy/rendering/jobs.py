"""Jobs for the children: each is one row under some templates. Outcomes come in order, whatever a template does.

Children are reused. Jobs are sent ahead while a child works. Where a child ends, the job that ended it is rendered
again in a new one, a template at a time, until the template is known; the other jobs are rendered as if nothing had
been.
"""

import atexit
import json
import os
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cappy.rendering import MAX_ANSWER, MAX_MEMORY
from cappy.rendering.process import ChildExitError, Process, close_all

MAX_SECONDS = 2.0
"""CPU time of one template on one row, and of compiling one."""
_MAX_REASON = 300
_MAX_LOADED = 4096
_MAX_IDLE = 2
_AHEAD_JOBS = 32
_AHEAD_CHARACTERS = 2**18


class Source:
    """A template of a kind (`child` lists them), as its `load` takes it. Equal ones are one; it hashes fast."""

    __slots__ = ("_hash", "kind", "parts")

    def __init__(self, kind: str, parts: tuple[str, ...]) -> None:
        self.kind, self.parts = kind, parts
        self._hash = hash((kind, parts))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and (self.kind, self.parts) == (other.kind, other.parts)


@dataclass(frozen=True, slots=True)
class Job:
    """Values as JSON (see `child.encode`), the templates that they are rendered with, each with an argument."""

    values: str = "{}"
    items: tuple[tuple[Source, object], ...] = ()
    load: tuple[Source, ...] = ()
    seconds: float = MAX_SECONDS


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no value. `limited`: it ran into a limit; `loading`: the template does not compile."""

    reason: str
    limited: bool = False
    loading: bool = False


_to_json = json.JSONEncoder(ensure_ascii=False).encode

Outcome = object
"""The value that a template gave, as JSON has it, or a Failure."""


def run(kind: str, jobs: Iterable[Job]) -> Iterator[list[Outcome]]:
    """The outcomes of each job, one for each of its items. An error of `jobs` itself is raised after the rest."""
    pending: deque[Job] = deque()
    with _lease(kind) as channel:
        for job in _with_end(jobs, pending):
            if job is not None:
                pending.append(job)
                channel.submit(job)
            while pending and (job is None or _is_full(pending)):
                yield from _finish(channel, pending)


def load(source: Source, seconds: float = MAX_SECONDS) -> Outcome:
    """What the kind says of a template once it is compiled."""
    with _lease(source.kind) as channel:
        if source not in channel.load_outcomes:
            list(channel.render_alone(Job(load=(source,), seconds=seconds)))
        return channel.load_outcomes[source]


def _with_end(jobs: Iterable[Job], pending: deque[Job]) -> Iterator[Job | None]:
    """The jobs, and None where nothing follows: at the end, and before an error of theirs."""
    try:
        yield from jobs
    except Exception:
        yield None
        raise
    yield None


def _is_full(pending: deque[Job]) -> bool:
    return len(pending) >= _AHEAD_JOBS or sum(len(job.values) for job in pending) >= _AHEAD_CHARACTERS


def _finish(channel: "_Channel", pending: deque[Job]) -> Iterator[list[Outcome]]:
    """The outcomes of the first pending job; of all, one at a time, where the child ended."""
    try:
        outcomes = channel.receive(pending[0])
    except ChildExitError as error:
        first = channel.render_again(pending.popleft(), error)
        yield first
        while pending:
            yield channel.render_alone(pending.popleft())
    else:
        pending.popleft()
        yield outcomes


class _Channel:
    """A child, and another one after it where it ends."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process = _acquire(kind)
        self._expected: deque[Source | Job] = deque()
        self._refused: dict[Source, Failure] = {}

    @property
    def load_outcomes(self) -> Mapping[Hashable, Outcome]:
        """What is known of the templates."""
        return self._process.load_outcomes | self._refused

    def submit(self, job: Job) -> None:
        """Sends a job, and before it the templates that the child does not have."""
        for source in job.load:
            self._number(source, job)
        items = _to_json([[self._number(source, job), argument] for source, argument in job.items])
        self._process.send(f'["run", {job.seconds}, {job.values}, {items}]'.encode("utf-8", "surrogatepass"))
        self._expected.append(job)

    def _number(self, source: Source, job: Job) -> int:
        """The number of a template in the child, which gets it now if it has it not; -1 of one that ends its child."""
        numbers = self._process.numbers
        number = numbers.get(source)
        if number is not None:
            return number
        if source in self._refused:
            return -1
        number = numbers[source] = len(numbers)
        message = _to_json(["load", number, job.seconds, *source.parts])
        self._process.send(message.encode("utf-8", "surrogatepass"))
        self._expected.append(source)
        return number

    def receive(self, job: Job) -> list[Outcome]:
        """The outcomes of the job that was sent first; EndedError where the child ended."""
        process = self._process
        seconds = _WALL_SECONDS + _WALL_SHARE * job.seconds * max(1, len(job.items))
        while True:
            expected = self._expected[0]
            answer = _parse(process, process.receive(seconds))
            if isinstance(expected, Source):
                process.load_outcomes[expected] = _outcome(answer, job.seconds, loading=True)
                self._expected.popleft()
                continue
            if not isinstance(answer, list) or len(answer) != len(job.items):
                process.close()
                raise ChildExitError(_NONSENSE)
            if len(answer) > 1 and {"limit": "size"} in answer:  # which of them is not known
                process.close()
                raise ChildExitError("size")
            self._expected.popleft()
            return [
                self._outcome(source, one, job) if isinstance(one, dict) else one
                for (source, _), one in zip(job.items, answer, strict=True)
            ]

    def render_alone(self, job: Job) -> list[Outcome]:
        """The outcomes of a job while no other is under way."""
        fresh = self._process.num_answers == 0
        try:
            self.submit(job)
            return self.receive(job)
        except ChildExitError as error:
            return self.render_again(job, error, fresh=fresh)

    def render_again(self, job: Job, error: ChildExitError, *, fresh: bool = False) -> list[Outcome]:
        """The outcomes of the job that ended the child; `fresh` where the child had done nothing else."""
        first = self._expected[0] if self._expected else None
        self._restart()
        certain = fresh or error.limit in _CERTAIN
        if isinstance(first, Source) and certain:
            self._refused[first] = _limit_failure(error.limit, job.seconds, loading=True)
        if len(job.items) > 1:
            return [self.render_alone(replace(job, items=(item,)))[0] for item in job.items]
        if certain:
            return [_limit_failure(error.limit, job.seconds, loading=isinstance(first, Source))]
        # The child had done other work, and may have run out of what that had left. A new one has not.
        return self.render_alone(job)

    def release(self) -> None:
        """Gives the child back for the next, unless it still works."""
        if self._expected:
            self._process.close()
        else:
            _release(self._process)

    def _outcome(self, source: Source, answer: dict[str, object], job: Job) -> Outcome:
        if answer.get("limit") == "unloaded":
            return self._refused.get(source) or self._process.load_outcomes[source]
        return _outcome(answer, job.seconds)

    def _restart(self) -> None:
        self._expected.clear()
        self._process.close()
        self._process = Process(self._kind)


_WALL_SECONDS, _WALL_SHARE = 60.0, 10.0
"""How long to wait for an answer: on a busy machine a second of CPU time can take many seconds."""
_CERTAIN = ("time", "size")
_NONSENSE = "answers what it was not asked"


def _parse(process: Process, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        process.close()
        raise ChildExitError(_NONSENSE) from error


def _outcome(answer: object, seconds: float, *, loading: bool = False) -> Outcome:
    if not isinstance(answer, dict):
        return answer
    if "limit" in answer:
        return _limit_failure(str(answer["limit"])[:_MAX_REASON], seconds, loading=loading)
    return Failure(" ".join(str(answer.get("error")).split())[:_MAX_REASON], loading=loading)


def _limit_failure(limit: str, seconds: float, *, loading: bool = False) -> Failure:
    reasons = {
        "time": f"takes longer than {seconds:g} seconds",
        "memory": f"needs more than {MAX_MEMORY // 2**20} MiB",
        "size": f"makes more than {MAX_ANSWER // 2**20} MiB of text",
    }
    return Failure(reasons.get(limit, limit), limited=True, loading=loading)


_idle: dict[str, list[Process]] = {}
_lock = threading.Lock()


@contextmanager
def _lease(kind: str) -> Iterator[_Channel]:
    channel = _Channel(kind)
    try:
        yield channel
    finally:
        channel.release()


def _acquire(kind: str) -> Process:
    with _lock:
        idle = _idle.get(kind)
        if idle:
            return idle.pop()
    return Process(kind)


def close_children() -> None:
    """Ends all children, idle ones too; the next job starts a new one."""
    with _lock:
        close_all()
        _idle.clear()


def _release(process: Process) -> None:
    with _lock:
        idle = _idle.setdefault(process.kind, [])
        if process.is_ours and len(idle) < _MAX_IDLE and len(process.numbers) < _MAX_LOADED:
            idle.append(process)
            return
    process.close()


def _reset_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    close_children()


os.register_at_fork(after_in_child=_reset_after_fork)
atexit.register(close_children)
