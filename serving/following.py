"""Follows an alias of the registry, so that a new version is served without a restart.

A new version is downloaded, verified, loaded and probed in a thread while the current model answers, then swapped in
between two requests. A version that cannot be downloaded or loaded, or fails its probe, is never served.
"""

import asyncio
import contextlib
import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from cappy.errors import CappyError, UnreachableError, quote
from cappy.registry.models import Version
from cappy.scoring import Precision
from serving.config import FOLLOW_SECONDS
from serving.engine import PROBES, Model, Models, load, probe

LOGGER = logging.getLogger("serving")
MAX_FETCH_ATTEMPTS = 3
"""A version whose files cannot be reached is refused after this many attempts."""
SHUTDOWN_SECONDS = 5.0
"""How long a version that is being loaded may delay the end of the process, in seconds."""
Result = TypeVar("Result")
Change = Literal["swap", "refusal"]


@dataclass(kw_only=True)
class Follower:
    """Keeps `models` at the version that an alias names.

    `on_change` is called after each swap and each refusal. While the registry cannot be read, the current model keeps
    serving, and `alias_error` holds the error.
    """

    models: Models
    alias: str
    read_alias: Callable[[], Version]
    load: Callable[[Version], Model]
    seconds: float = FOLLOW_SECONDS
    on_change: Callable[[Change], None] = lambda change: None
    alias_error: str = ""
    _rolled_back_hash: str = ""
    """Content hash of the version that a manual rollback replaced.

    It is not served again until the alias has named another version.
    """
    _refused_hashes: dict[str, str] = field(default_factory=dict)
    """Refused version -> its content hash at that time."""
    _num_attempts: dict[str, int] = field(default_factory=dict)
    _check_requested: asyncio.Event = field(default_factory=asyncio.Event)
    _worker_done: "asyncio.Future[None] | None" = None

    async def run(self) -> None:
        """Checks the alias every `seconds` and on request, until it is cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    await self._check_requested.wait()
            self._check_requested.clear()
            try:
                await self.check()
            except Exception as error:
                # A bug: the current model keeps serving, and GET /model shows the error until a check succeeds.
                LOGGER.exception("following %s failed", self.alias)
                self.alias_error = format_error(error)

    def request_check(self, *, retry_refused: bool = False) -> None:
        """Makes `run` check the alias now; with `retry_refused` it tries refused versions again."""
        if retry_refused:
            for records in (self._refused_hashes, self._num_attempts, self.models.refused):
                records.clear()
        self._check_requested.set()

    def rollback(self) -> Model | None:
        """Returns to the former model until the alias moves; None if there is no former model."""
        model = self.models.roll_back()
        if model is not None and self.models.former is not None:
            self._rolled_back_hash = self.models.former.content_hash
            self._report_swap("manual rollback")
        return model

    async def check(self) -> None:
        """Reads the alias once and serves its version if it is new."""
        version = await self._resolve_alias()
        if version is None or version.content_hash == self._rolled_back_hash:
            return
        self._rolled_back_hash = ""
        current, former = self.models.current, self.models.former
        if (
            version.content_hash == current.content_hash
            or self._refused_hashes.get(version.uri) == version.content_hash
        ):
            return
        if former is not None and version.content_hash == former.content_hash:
            self.models.roll_back()
            self._report_swap(f"{self.alias} points to it again")
            return
        model = await self._prepare(version)
        if model is not None:
            await self._activate(version, model)

    async def close(self) -> None:
        """Waits up to `SHUTDOWN_SECONDS` for a version that is being loaded."""
        if self._worker_done is not None:
            await asyncio.wait([self._worker_done], timeout=SHUTDOWN_SECONDS)

    async def _resolve_alias(self) -> Version | None:
        """The version that the alias names; None if it cannot be read (only the first failure in a row is logged)."""
        try:
            version = await self._run_in_thread(self.read_alias)
        except Exception as error:  # noqa: BLE001 (the current model keeps serving on any error)
            if not self.alias_error:
                text = "%s cannot be read, version %s keeps serving: %s"
                LOGGER.warning(text, self.alias, self._version, format_error(error))
            self.alias_error = format_error(error)
            return None
        if self.alias_error:
            LOGGER.info("%s can be read again", self.alias)
        self.alias_error = ""
        return version

    async def _prepare(self, version: Version) -> Model | None:
        """Loads and probes a version; None if it is refused or cannot be reached yet."""
        try:
            return await self._run_in_thread(lambda: prepare_model(version, self.load))
        except UnreachableError as error:
            attempt = self._num_attempts[version.uri] = self._num_attempts.get(version.uri, 0) + 1
            if attempt < MAX_FETCH_ATTEMPTS:
                text = "%s cannot be downloaded, attempt %d of %d: %s"
                LOGGER.warning(text, version.uri, attempt, MAX_FETCH_ATTEMPTS, format_error(error))
                return None
            self._refuse(version, format_error(error))
        except Exception as error:  # noqa: BLE001 (loading may fail in any way)
            self._refuse(version, format_error(error))
            traceback.clear_frames(error.__traceback__)  # they keep the model in memory
        return None

    async def _activate(self, version: Version, model: Model) -> None:
        """Makes the model the current one, unless the alias has moved while it was loaded."""
        now = await self._resolve_alias()
        if now is not None and now.content_hash != version.content_hash:
            self._check_requested.set()
            return
        self.models.swap(model)
        for records in (self._refused_hashes, self._num_attempts, self.models.refused):
            records.pop(version.uri, None)
        self._report_swap(f"{self.alias} points to it")

    def _report_swap(self, reason: str) -> None:
        former = self.models.former
        LOGGER.info("version %s replaces version %s: %s", self._version, former and former.version, reason)
        self.on_change("swap")

    def _refuse(self, version: Version, reason: str) -> None:
        self._num_attempts.pop(version.uri, None)
        self._refused_hashes[version.uri] = version.content_hash
        self.models.refused[version.uri] = reason
        LOGGER.error("%s is refused, version %s keeps serving: %s", version.uri, self._version, reason)
        self.on_change("refusal")

    @property
    def _version(self) -> str:
        return self.models.current.version

    async def _run_in_thread(self, work: Callable[[], Result]) -> Result:
        """Returns the result of `work`, run in a daemon thread, which does not keep the process from ending."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        self._worker_done = loop.create_future()
        threading.Thread(
            target=_run_and_deliver, args=(work, loop, result, self._worker_done), name="following", daemon=True
        ).start()
        return await result


def _run_and_deliver(
    work: Callable[[], Result],
    loop: asyncio.AbstractEventLoop,
    result: "asyncio.Future[Result]",
    worker_done: "asyncio.Future[None]",
) -> None:
    outcome: Result | None = None
    failed: Exception | None = None
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001 (awaiting the future raises it)
        failed = error

    def deliver() -> None:
        worker_done.set_result(None)
        if result.done():
            return
        if failed is not None:
            result.set_exception(failed)
        else:
            result.set_result(outcome)  # type: ignore[arg-type]

    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(deliver)


def prepare_model(version: Version, load: Callable[[Version], Model]) -> Model:
    """Loads a version and probes it with the verification pairs of its evaluation."""
    model = load(version)
    probe(model, model.probes or PROBES)
    return model


def load_version(version: Version, spec: str, name: str = "", precision: Precision = "auto") -> Model:
    """Loads the version that `spec` named, by its number, so that it does not matter if the alias moves meanwhile."""
    return replace(load(version.uri, name, precision), spec=spec, registered=version)


def format_error(error: Exception) -> str:
    """Formats an error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CappyError) else quote(f"{type(error).__name__}: {text}", 200)
