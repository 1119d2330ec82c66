"""Loads a scorer and serves the gateway until SIGTERM."""

import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.bodies import Bounds
from serving.browsers import hosts_of
from serving.connections import connections_upstream, raise_file_limit
from serving.ending import Door, NoticeServer
from serving.gateway.answering import Gateway
from serving.gateway.app import MAX_BODY_BYTES, Access, create_app
from serving.gateway.feedback import FeedbackLog
from serving.gateway.ledger import Limits
from serving.gateway.llm import LLM
from serving.gateway.policy import Policy
from serving.gateway.schemas import BOUNDS
from serving.gateway.scoring import Scoring, load
from serving.gateway.upstream import Upstream
from serving.keys import Keys
from serving.repeats import log_to_stderr
from serving.server import Address, bound, end, http_config, url


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a gateway is made of; `feedback` is the folder of the feedback log, None for none."""

    llm: LLM
    scorer: str
    scorer_key: str = field(default="", repr=False)
    """API key of the `cappy serve` at the address that `scorer` is."""
    calibration: Path | None = None
    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    second: LLM | None = None
    second_candidates: int = 1
    strip_reasoning: bool = False
    feedback: Path | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    bounds: Bounds = BOUNDS
    keys: Keys = field(default_factory=Keys)
    """Of this gateway's clients; they are never sent to an LLM."""
    origins: Sequence[str] = ()


def run(settings: Settings, address: Address) -> None:
    """Takes the address, loads the scorer, listens; returns when it was told to stop and has answered what it had.

    CappyError if the address or the feedback log's folder cannot be had, which is found out before the scorer is
    loaded. SIGTERM ends the process with status 0.
    """
    signal.signal(signal.SIGTERM, end)
    log_to_stderr()
    raise_file_limit()
    # It would tell every call of the LLM, with its address.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    with bound(address.host, address.port) as listener:
        feedback = FeedbackLog(settings.feedback) if settings.feedback is not None else None
        scoring = load(settings.scorer, settings.calibration, settings.scorer_key)
        listener.listen()
        door = Door()
        hosts = hosts_of(listener, address.allowed_hosts, bool(settings.keys))
        app = create_app(
            _gateway(settings, scoring),
            feedback=feedback,
            max_body_bytes=settings.max_body_bytes,
            bounds=settings.bounds,
            access=Access(keys=settings.keys, hosts=hosts, origins=settings.origins),
            door=door,
        )
        server = NoticeServer(http_config(app, address, upstream=True), door, address.notice_seconds)
        sys.stderr.write(started(settings, scoring, listener) + "\n")
        server.run(sockets=[listener])


def started(settings: Settings, scoring: Scoring, listener: socket.socket) -> str:
    """The line that says what is served where, and what the scores mean."""
    found = scoring.calibration
    scores = f"calibrated to {found.metric}" if found else "raw scores: no calibration.json beside it"
    what = f"best of {settings.policy.candidates} from {settings.llm.url}"
    return f"cappy gateway: {what} by scorer {scoring.version() or settings.scorer} ({scores}) at {url(listener)}/v1"


def _gateway(settings: Settings, scoring: Scoring) -> Gateway:
    second = settings.second
    connections = connections_upstream() // (1 if second is None else 2)
    return Gateway(
        first=Upstream(settings.llm, connections=connections, strip_reasoning=settings.strip_reasoning),
        scoring=scoring,
        policy=settings.policy,
        limits=settings.limits,
        second=None
        if second is None
        else Upstream(second, name="the second LLM", connections=connections, strip_reasoning=settings.strip_reasoning),
        second_candidates=settings.second_candidates,
    )
