"""Loads a scorer and serves the gateway until SIGTERM."""

import logging
import socket
import sys

import httpx2

from cappy.errors import ConfigError, quote
from cappy.sampling.endpoint.address import NO_KEY, api_key, base_address, refuse_secrets
from cappy.selection.linear import Selector
from serving.access import start_tracing
from serving.connections import max_upstream_connections
from serving.gateway.answering import Gateway
from serving.gateway.app import Access, create_app
from serving.gateway.config import GatewayConfig
from serving.gateway.feedback import FeedbackLog
from serving.gateway.policy import Prices
from serving.gateway.scoring import Scoring, load
from serving.gateway.upstream import LLM, Upstream
from serving.guards import hosts_of, read_keys
from serving.listener import GracefulServer, ShutdownFlag, bind, format_url, http_config, prepare_process


def run(config: GatewayConfig) -> None:
    """Binds the address, loads the scorer and serves the gateway; returns after a graceful shutdown.

    Raises CappyError before the scorer is loaded if the address cannot be bound or the feedback folder cannot be used.
    SIGTERM ends the process with status 0.
    """
    llm, second_llm = _make_llms(config)
    scorer_key, keys = read_key(config.scorer, config.scorer_key_variable), read_keys(config.api_keys)
    prepare_process()
    # At INFO it logs the address of every call to the LLM.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    with bind(config.host, config.port) as listener:
        feedback = FeedbackLog(config.feedback) if config.feedback is not None else None
        scoring = load(config.scorer, config.calibration, config.selector, scorer_key)
        listener.listen()
        shutdown = ShutdownFlag()
        app = create_app(
            assemble(config, llm, second_llm, scoring),
            feedback=feedback,
            limits=config,
            access=Access(keys=keys, hosts=hosts_of(listener, config.hosts, bool(keys)), origins=config.allow_origin),
            shutdown=shutdown,
            tracing=start_tracing(),
        )
        server = GracefulServer(http_config(app, config, upstream=True), shutdown, config.notice)
        sys.stderr.write(describe_start(config, llm, scoring, listener) + "\n")
        server.run(sockets=[listener])


def _make_llms(config: GatewayConfig) -> tuple[LLM, LLM | None]:
    """Creates the LLM and the second one, if any; raises ConfigError for an invalid address or a missing key."""
    prices = Prices(input=config.price_input, output=config.price_output)
    llm = make_llm(config.upstream, key_variable=config.key_variable, prices=prices)
    if not config.escalate_to:
        return llm, None
    second_llm = make_llm(
        config.escalate_to,
        model=config.escalate_model,
        key_variable=config.escalate_key_variable,
        # It may be another provider's server, so a client's key is not sent to it.
        passes_key=False,
        prices=Prices(input=config.escalate_price_input, output=config.escalate_price_output),
    )
    return llm, second_llm


def make_llm(url: str, *, model: str = "", key_variable: str = "", passes_key: bool = True, prices: Prices) -> LLM:
    """Creates an LLM with its key from the environment; raises ConfigError for an invalid address or a missing key."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{quote(url)}: not an LLM's address; give one such as http://host:port/v1")
    refuse_secrets(url)
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{quote(url)}: not an address ({error}); give one such as http://host:port/v1") from error
    key = read_key(url, key_variable)
    return LLM(url=base_address(url), model=model, key=key, passes_key=passes_key, prices=prices)


def read_key(url: str, variable: str) -> str:
    """Reads a server's key from an environment variable; empty if `variable` is; ConfigError if unset."""
    key = api_key(variable) if variable else ""
    if key == NO_KEY:
        raise ConfigError(f"{variable} is not set; put the key of {url} there, or leave the flag out")
    return key


def assemble(config: GatewayConfig, llm: LLM, second_llm: LLM | None, scoring: Scoring) -> Gateway:
    """Creates the gateway; its LLMs share the connections that the process may open."""
    connections = max_upstream_connections() // (1 if second_llm is None else 2)

    def make_upstream(llm: LLM, name: str) -> Upstream:
        return Upstream(llm, name=name, connections=connections, strip_reasoning=config.strip_reasoning)

    return Gateway(
        upstream=make_upstream(llm, "the LLM"),
        scoring=scoring,
        policy=config,
        limits=config,
        second_upstream=None if second_llm is None else make_upstream(second_llm, "the second LLM"),
        second_candidates=config.escalate_candidates,
    )


def describe_start(config: GatewayConfig, llm: LLM, scoring: Scoring, listener: socket.socket) -> str:
    """The line that is printed at the start: the LLM, the scorer, the address, and whether scores are calibrated."""
    calibration, rules = scoring.calibration, scoring.selector.rules
    scores = f"calibrated to {calibration.metric}" if calibration else "raw scores: no calibration.json"
    picks = "picks by the score alone" if rules == Selector().rules else "picks by its selector"
    what = f"best of {config.candidates} from {llm.url}"
    scorer = f"scorer {scoring.version() or config.scorer} ({scores}; {picks})"
    return f"cappy gateway: {what} by {scorer} at {format_url(listener)}/v1"
