"""Runs jobs in child processes. A job is one row with some templates; outcomes are returned in order.

Children are reused, and jobs are queued while a child works. If a child exits, the job that caused it is rendered again
in a new child, one template at a time, to find the responsible one; the other jobs are not affected.
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
"""Limit on the CPU time of rendering one row with one template, and of compiling one template, in seconds."""
_MAX_REASON_CHARACTERS = 300
_MAX_LOADED_TEMPLATES = 4096
_MAX_IDLE_CHILDREN = 2
_MAX_QUEUED_JOBS = 32
_MAX_QUEUED_CHARACTERS = 2**18


class TemplateSource:
    """A template: its kind, and the arguments passed to that kind's `load` function in the child process.

    Hashable, with a cached hash; `child` has the kinds.
    """

    __slots__ = ("_hash", "kind", "load_arguments")

    def __init__(self, kind: str, load_arguments: tuple[str, ...]) -> None:
        self.kind, self.load_arguments = kind, load_arguments
        self._hash = hash((kind, load_arguments))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TemplateSource) and (self.kind, self.load_arguments) == (
            other.kind,
            other.load_arguments,
        )


@dataclass(frozen=True, slots=True)
class RenderJob:
    """Values as JSON (see `child.encode`) and the templates to render with them, each with an argument.

    `load` lists templates that are only compiled. `seconds` limits the CPU time of each template.
    """

    values: str = "{}"
    items: tuple[tuple[TemplateSource, object], ...] = ()
    load: tuple[TemplateSource, ...] = ()
    seconds: float = MAX_SECONDS


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a template has no value; `exceeded_limit` if it exceeded a limit, `loading` if it does not compile."""

    reason: str
    exceeded_limit: bool = False
    loading: bool = False


_to_json = json.JSONEncoder(ensure_ascii=False).encode

Outcome = object
"""The value of a template as parsed JSON, or a Failure."""


def run(kind: str, jobs: Iterable[RenderJob]) -> Iterator[list[Outcome]]:
    """Yields the outcomes of each job, one per item; an error in the iterator `jobs` is raised after these outcomes."""
    pending: deque[RenderJob] = deque()
    with _lease(kind) as channel:
        for job in _append_sentinel(jobs, pending):
            if job is not None:
                pending.append(job)
                channel.submit(job)
            while pending and (job is None or _is_full(pending)):
                yield from _finish(channel, pending)


def load(source: TemplateSource, seconds: float = MAX_SECONDS) -> Outcome:
    """Compiles a template; returns what the child's `load` returned, or a Failure."""
    with _lease(source.kind) as channel:
        if source not in channel.load_outcomes:
            list(channel.render_alone(RenderJob(load=(source,), seconds=seconds)))
        return channel.load_outcomes[source]


def _append_sentinel(jobs: Iterable[RenderJob], pending: deque[RenderJob]) -> Iterator[RenderJob | None]:
    """Yields the jobs, then None at the end or before an error of the iterator is raised."""
    try:
        yield from jobs
    except Exception:
        yield None
        raise
    yield None


def _is_full(pending: deque[RenderJob]) -> bool:
    return len(pending) >= _MAX_QUEUED_JOBS or sum(len(job.values) for job in pending) >= _MAX_QUEUED_CHARACTERS


def _finish(channel: "_Channel", pending: deque[RenderJob]) -> Iterator[list[Outcome]]:
    """The outcomes of the first pending job; of all pending jobs, one at a time, if the child has exited."""
    try:
        outcomes = channel.receive(pending[0])
    except ChildExitError as error:
        yield channel.render_again(pending.popleft(), error)
        while pending:
            yield channel.render_alone(pending.popleft())
    else:
        pending.popleft()
        yield outcomes


class _Channel:
    """A connection to a child process; if the child exits, a new one replaces it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process = _acquire(kind)
        self._expected: deque[TemplateSource | RenderJob] = deque()
        self._failures: dict[TemplateSource, Failure] = {}

    @property
    def load_outcomes(self) -> Mapping[Hashable, Outcome]:
        """The outcomes of loading templates so far."""
        return self._process.load_outcomes | self._failures

    def submit(self, job: RenderJob) -> None:
        """Sends a job, after the templates that the child has not loaded."""
        for source in job.load:
            self._load_if_missing(source, job)
        items = _to_json([[self._load_if_missing(source, job), argument] for source, argument in job.items])
        self._process.send(f'["run", {job.seconds}, {job.values}, {items}]'.encode("utf-8", "surrogatepass"))
        self._expected.append(job)

    def _load_if_missing(self, source: TemplateSource, job: RenderJob) -> int:
        """The template's number in the child, which loads it first if needed; -1 if loading it ended a child."""
        numbers = self._process.template_numbers
        number = numbers.get(source)
        if number is not None:
            return number
        if source in self._failures:
            return -1
        number = numbers[source] = len(numbers)
        message = _to_json(["load", number, job.seconds, *source.load_arguments])
        self._process.send(message.encode("utf-8", "surrogatepass"))
        self._expected.append(source)
        return number

    def receive(self, job: RenderJob) -> list[Outcome]:
        """The outcomes of the oldest sent job; raises ChildExitError if the child exits."""
        process = self._process
        seconds = _WALL_SECONDS + _WALL_FACTOR * job.seconds * max(1, len(job.items))
        while True:
            expected = self._expected[0]
            answer = _parse(process, process.receive(seconds))
            if isinstance(expected, TemplateSource):
                process.load_outcomes[expected] = _outcome(answer, job.seconds, loading=True)
                self._expected.popleft()
                continue
            if not isinstance(answer, list) or len(answer) != len(job.items):
                process.close()
                raise ChildExitError(_PROTOCOL_ERROR)
            if len(answer) > 1 and {"limit": "size"} in answer:  # it is not known which item was too large
                process.close()
                raise ChildExitError("size")
            self._expected.popleft()
            return [
                self._item_outcome(source, item, job) if isinstance(item, dict) else item
                for (source, _), item in zip(job.items, answer, strict=True)
            ]

    def render_alone(self, job: RenderJob) -> list[Outcome]:
        """The outcomes of a job while no other job is pending."""
        fresh = self._process.num_answers == 0
        try:
            self.submit(job)
            return self.receive(job)
        except ChildExitError as error:
            return self.render_again(job, error, fresh=fresh)

    def render_again(self, job: RenderJob, error: ChildExitError, *, fresh: bool = False) -> list[Outcome]:
        """The outcomes of the job during which the child exited; `fresh` if it was the child's first job."""
        unanswered = self._expected[0] if self._expected else None
        self._restart()
        is_template_fault = fresh or error.reason in _TEMPLATE_LIMITS
        if isinstance(unanswered, TemplateSource) and is_template_fault:
            self._failures[unanswered] = _limit_failure(error.reason, job.seconds, loading=True)
        if len(job.items) > 1:
            return [self.render_alone(replace(job, items=(item,)))[0] for item in job.items]
        if is_template_fault:
            return [_limit_failure(error.reason, job.seconds, loading=isinstance(unanswered, TemplateSource))]
        # Earlier jobs may have used up the old child's resources, so try again in a new one.
        return self.render_alone(job)

    def release(self) -> None:
        """Returns the child to the pool, or ends it if it is still working."""
        if self._expected:
            self._process.close()
        else:
            _release(self._process)

    def _item_outcome(self, source: TemplateSource, answer: dict[str, object], job: RenderJob) -> Outcome:
        if answer.get("limit") == "unloaded":
            return self._failures.get(source) or self._process.load_outcomes[source]
        return _outcome(answer, job.seconds)

    def _restart(self) -> None:
        self._expected.clear()
        self._process.close()
        self._process = Process(self._kind)


_WALL_SECONDS, _WALL_FACTOR = 60.0, 10.0
"""An answer may take `_WALL_SECONDS` plus `_WALL_FACTOR` times the limit on CPU time.

On a busy machine, a second of CPU time can take many seconds.
"""
_TEMPLATE_LIMITS = ("time", "size")
"""Limits that are always the template's own fault; memory may have been used up by earlier jobs."""
_PROTOCOL_ERROR = "its process sent an invalid answer"


def _parse(process: Process, line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        process.close()
        raise ChildExitError(_PROTOCOL_ERROR) from error


def _outcome(answer: object, seconds: float, *, loading: bool = False) -> Outcome:
    if not isinstance(answer, dict):
        return answer
    if "limit" in answer:
        return _limit_failure(str(answer["limit"])[:_MAX_REASON_CHARACTERS], seconds, loading=loading)
    return Failure(" ".join(str(answer.get("error")).split())[:_MAX_REASON_CHARACTERS], loading=loading)


def _limit_failure(limit: str, seconds: float, *, loading: bool = False) -> Failure:
    reasons = {
        "time": f"takes longer than {seconds:g} seconds",
        "memory": f"needs more than {MAX_MEMORY // 2**20} MiB",
        "size": f"makes more than {MAX_ANSWER // 2**20} MiB of text",
    }
    return Failure(reasons.get(limit, limit), exceeded_limit=True, loading=loading)


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
    """Ends all children, including idle ones; the next job starts a new one."""
    with _lock:
        close_all()
        _idle.clear()


def _release(process: Process) -> None:
    with _lock:
        idle = _idle.setdefault(process.kind, [])
        if (
            process.is_usable
            and len(idle) < _MAX_IDLE_CHILDREN
            and len(process.template_numbers) < _MAX_LOADED_TEMPLATES
        ):
            idle.append(process)
            return
    process.close()


def _reset_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    close_children()


os.register_at_fork(after_in_child=_reset_after_fork)
atexit.register(close_children)
