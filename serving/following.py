"""Follows an alias of the registry: the version that it comes to name takes the place of the one that answers.

A new version is downloaded, verified, loaded and probed in a thread beside the model that answers, and put in its place
between two requests. One that cannot be had, loaded or that answers otherwise than it was evaluated never serves.
"""

import asyncio
import contextlib
import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from cappy.errors import CappyError, UnreachableError, shown
from cappy.registry.models import Version
from cappy.scoring import Precision
from serving.config import FOLLOW_SECONDS
from serving.engine import PROBES, Model, Models, load, probe

LOGGER = logging.getLogger("serving")
TRIES = 3
"""How often a version is fetched whose files cannot be reached, before it is refused."""
CLOSING_SECONDS = 5.0
"""How long a version that is being loaded may hold up the end of the process."""
Result = TypeVar("Result")
Change = Literal["swap", "refusal"]


@dataclass(kw_only=True)
class Follower:
    """Keeps `models` at what an alias names; `find` reads the alias, `load` makes a model of a version.

    `on_change` is called after each swap and each refusal. While the registry cannot be read, the model that answers
    goes on, and `trouble` says why.
    """

    models: Models
    alias: str
    find: Callable[[], Version]
    load: Callable[[Version], Model]
    seconds: float = FOLLOW_SECONDS
    on_change: Callable[[Change], None] = lambda change: None
    trouble: str = ""
    _left: str = ""
    """Content that a rollback by hand took out of service: not taken again until the alias has named another."""
    _bad: dict[str, str] = field(default_factory=dict)
    """Version that was refused -> its content then."""
    _tries: dict[str, int] = field(default_factory=dict)
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    _busy: "asyncio.Future[None] | None" = None

    async def run(self) -> None:
        """Looks at the alias every so many seconds and whenever asked, until it is cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    await self._asked.wait()
            self._asked.clear()
            try:
                await self.look()
            except Exception as error:
                # A defect of ours: what answers goes on, and GET /model tells it until a look succeeds.
                LOGGER.exception("following %s failed", self.alias)
                self.trouble = reason(error)

    def ask(self, *, again: bool = False) -> None:
        """Has `run` look at once; `again` gives versions that were refused another chance."""
        if again:
            for known in (self._bad, self._tries, self.models.refused):
                known.clear()
        self._asked.set()

    def rollback(self) -> Model | None:
        """Changes the model for the one before, which stays until the alias moves; None if there is none."""
        model = self.models.back()
        if model is not None and self.models.former is not None:
            self._left = self.models.former.content
            self._swapped("by hand")
        return model

    async def look(self) -> None:
        """Reads the alias once and does what follows from it."""
        version = await self._named()
        if version is None or version.content == self._left:
            return
        self._left = ""
        current, former = self.models.current, self.models.former
        if version.content == current.content or self._bad.get(version.uri) == version.content:
            return
        if former is not None and version.content == former.content:
            self.models.back()
            self._swapped(f"{self.alias} names it again")
            return
        model = await self._prepared(version)
        if model is not None:
            await self._enter(version, model)

    async def close(self) -> None:
        """Waits a little for what is being loaded."""
        if self._busy is not None:
            await asyncio.wait([self._busy], timeout=CLOSING_SECONDS)

    async def _named(self) -> Version | None:
        """The version that the alias names; None, and one warning until it succeeds again, where that is not known."""
        try:
            version = await self._beside(self.find)
        except Exception as error:  # noqa: BLE001 (whatever it is, the model that answers goes on)
            if not self.trouble:
                LOGGER.warning("%s cannot be read, version %s goes on: %s", self.alias, self._version, reason(error))
            self.trouble = reason(error)
            return None
        if self.trouble:
            LOGGER.info("%s can be read again", self.alias)
        self.trouble = ""
        return version

    async def _prepared(self, version: Version) -> Model | None:
        """The version, loaded and probed; None where it may not serve, or not yet."""
        try:
            return await self._beside(lambda: prepared(version, self.load))
        except UnreachableError as error:
            tries = self._tries[version.uri] = self._tries.get(version.uri, 0) + 1
            if tries < TRIES:
                LOGGER.warning("%s cannot be had, attempt %d of %d: %s", version.uri, tries, TRIES, reason(error))
                return None
            self._refuse(version, reason(error))
        except Exception as error:  # noqa: BLE001 (a version may be bad in any way)
            self._refuse(version, reason(error))
            traceback.clear_frames(error.__traceback__)  # they hold the model
        return None

    async def _enter(self, version: Version, model: Model) -> None:
        """Lets the model answer, unless the alias has moved on while it was loaded."""
        now = await self._named()
        if now is not None and now.content != version.content:
            self._asked.set()
            return
        self.models.swap(model)
        for known in (self._bad, self._tries, self.models.refused):
            known.pop(version.uri, None)
        self._swapped(f"{self.alias} names it")

    def _swapped(self, why: str) -> None:
        former = self.models.former
        LOGGER.info("version %s answers instead of %s: %s", self._version, former and former.version, why)
        self.on_change("swap")

    def _refuse(self, version: Version, why: str) -> None:
        self._tries.pop(version.uri, None)
        self._bad[version.uri] = version.content
        self.models.refused[version.uri] = why
        LOGGER.error("%s is refused, version %s goes on: %s", version.uri, self._version, why)
        self.on_change("refusal")

    @property
    def _version(self) -> str:
        return self.models.current.version

    async def _beside(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, computed in a thread that does not keep the process from ending."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        self._busy = loop.create_future()
        threading.Thread(target=_run, args=(work, loop, result, self._busy), name="following", daemon=True).start()
        return await result


def _run(
    work: Callable[[], Result],
    loop: asyncio.AbstractEventLoop,
    result: "asyncio.Future[Result]",
    busy: "asyncio.Future[None]",
) -> None:
    outcome: Result | None = None
    failed: Exception | None = None
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001 (told to whoever waits)
        failed = error

    def deliver() -> None:
        busy.set_result(None)
        if result.done():
            return
        if failed is not None:
            result.set_exception(failed)
        else:
            result.set_result(outcome)  # type: ignore[arg-type]

    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(deliver)


def prepared(version: Version, load: Callable[[Version], Model]) -> Model:
    """A version's model, loaded, and probed with what its evaluation stored."""
    model = load(version)
    probe(model, model.probes or PROBES)
    return model


def load_version(version: Version, spec: str, name: str = "", precision: Precision = "auto") -> Model:
    """The model of the version that `spec` named: by its number, which no alias can move in between."""
    return replace(load(version.uri, name, precision), spec=spec, registered=version)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CappyError) else shown(f"{type(error).__name__}: {text}", 200)
