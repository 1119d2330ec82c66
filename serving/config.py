"""Settings of `cappy serve`, and those that it shares with `cappy gateway`; every field is a flag.

It imports nothing of the service, so that usage errors are reported before anything is loaded.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from cappy.config import ADVANCED, Renames, settings
from cappy.errors import ConfigError, quote
from cappy.scoring import Precision

ANY = "*"
EVALUATION_HEADER = "X-Cappy-Evaluation-Sha256"
"""Header of scores: the sha256 of the selector and the calibration of their scorer."""
DEFAULT_SCORER = "models:/cappy@champion"
FOLLOW_SECONDS = 30.0
"""Default interval between two checks of an alias, in seconds."""
HOSTS_VARIABLE = "CAPPY_ALLOWED_HOSTS"
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]")
_ORIGIN = re.compile(r"https?://[^/\s*]+")

Port = Annotated[int, Field(ge=0, le=65535, description="TCP port; 0 takes any free one")]


@settings
class ListenerConfig:
    """Where a service listens and how it shuts down; times in seconds.

    After SIGTERM it reports not ready but still answers for `notice` seconds, so that a load balancer stops sending
    requests. Then it accepts no more connections and finishes open requests within `grace` seconds.
    """

    host: Annotated[str, Field(description="Address to listen on; 0.0.0.0 accepts other machines")] = "127.0.0.1"
    port: Port = 8080
    notice: Annotated[
        float, ADVANCED, Field(ge=0, description="Seconds after SIGTERM in which it still answers but is not ready")
    ] = 1.0
    grace: Annotated[
        int, ADVANCED, Field(ge=1, description="Seconds after --notice to finish requests that were accepted")
    ] = 30


@settings
class AccessConfig:
    """Who may send requests: API keys, origins of pages and host names."""

    api_keys: Annotated[
        Path | None,
        Field(
            description="File of API keys, one per line; # starts a comment. Default: CAPPY_API_KEYS, separated by "
            "commas"
        ),
    ] = None
    allow_origin: Annotated[
        tuple[str, ...],
        ADVANCED,
        Field(description="Origin whose pages may send requests from a browser (CORS), * for any"),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        ADVANCED,
        Field(
            description="Host name that the service answers to (Host header), in addition to those of its address; "
            "* for any. Default: CAPPY_ALLOWED_HOSTS, separated by commas"
        ),
    ] = ()

    def __post_init__(self) -> None:
        for origin in self.allow_origin:
            if origin != ANY and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--allow-origin {origin}: not an origin; give one such as https://app.example, or *")
        _check_hosts("--allowed-hosts", self.hosts)

    @property
    def hosts(self) -> Sequence[str]:
        """The allowed names; a flag may hold several, separated by commas."""
        return _split_values(self.allowed_hosts)


@settings
class BodyLimits:
    """Limits of a request body, for both services; sizes in megabytes (1e6 bytes) and characters."""

    max_body_mb: Annotated[
        float, ADVANCED, Field(ge=0.001, description="Largest request body in megabytes; larger ones get status 413")
    ] = 8.0
    max_characters: Annotated[
        int,
        ADVANCED,
        Field(ge=1, description="Maximum characters of a text or a conversation; longer ones are refused"),
    ] = 200_000
    max_text_mb: Annotated[
        float,
        ADVANCED,
        Field(ge=0.001, description="Maximum megabytes (UTF-8) of all texts of a request; more get status 413"),
    ] = 2.0

    @property
    def max_body_bytes(self) -> int:
        """Maximum size of a body."""
        return round(self.max_body_mb * 1e6)

    @property
    def max_text_bytes(self) -> int:
        """Maximum size of all texts of a request in UTF-8.

        Each distinct text counts once, because it is tokenized once.
        """
        return round(self.max_text_mb * 1e6)


@settings
class RequestLimits(BodyLimits):
    """Limits of a request for scores; `timeout` starts when it arrives, and a request may set a lower one."""

    max_pairs: Annotated[int, ADVANCED, Field(ge=1, description="Maximum pairs in a request; more get status 413")] = (
        1024
    )
    timeout: Annotated[
        float,
        ADVANCED,
        Field(ge=0.1, description="Maximum seconds for a request; a longer one gets status 504"),
    ] = 60.0


@settings
class ServedScorer:
    """The scorer that is served, and how it runs."""

    RENAMED: ClassVar[Renames] = {"follow": "follow_seconds"}

    scorer: Annotated[
        str,
        Field(
            description="Scorer: models:/name@alias, models:/name/version, builtin, a folder, hub:org/name@revision "
            "or a folder in a bucket (gs://); AIP_STORAGE_URI overrides the default"
        ),
    ] = DEFAULT_SCORER
    model_name: Annotated[str, Field(description="Model name for clients; default: the scorer's own name")] = ""
    precision: Annotated[
        Precision,
        ADVANCED,
        Field(description="Precision of the encoder; auto is bf16 if the device has instructions for it"),
    ] = "auto"
    follow_seconds: Annotated[
        float | None,
        ADVANCED,
        Field(ge=0, description="Seconds between checks of the alias; default 30; 0: check only at the start"),
    ] = None
    batch_tokens: Annotated[
        int,
        ADVANCED,
        Field(
            ge=0,
            description="Tokens in a batch; smaller batches reduce latency, larger ones increase throughput; "
            "0: chosen for the device",
        ),
    ] = 0
    max_queued_tokens: Annotated[
        int,
        ADVANCED,
        Field(ge=0, description="Maximum tokens in the queue; more get status 429; 0: the tokens of 32 batches"),
    ] = 0

    def __post_init__(self) -> None:
        if self.follow_seconds and not self._is_alias():
            raise ConfigError(
                f"--follow-seconds {self.follow_seconds:g}: {quote(self.scorer)} "
                "is not an alias, so its version never changes; give models:/name@alias"
            )

    @property
    def follow_interval(self) -> float:
        """Seconds between two checks of the alias; 0 if it is not followed."""
        if self.follow_seconds is not None:
            return self.follow_seconds
        return FOLLOW_SECONDS if self._is_alias() else 0.0

    def _is_alias(self) -> bool:
        if "://" in self.scorer:
            return False
        from cappy.specs import parse_spec  # imports pyarrow, which would slow down `--help`

        spec = parse_spec(self.scorer)
        return spec.kind == "models" and not spec.revision.isdigit()


@settings
class ServeConfig(RequestLimits, AccessConfig, ListenerConfig, ServedScorer):
    """Settings of `cappy serve`."""

    tls_certificate: Annotated[Path | None, Field(description="Certificate chain (PEM), to serve HTTPS")] = None
    tls_key: Annotated[Path | None, Field(description="Private key of the certificate (PEM)")] = None

    def __post_init__(self) -> None:
        ServedScorer.__post_init__(self)
        AccessConfig.__post_init__(self)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("--tls-certificate and --tls-key: give both or none")
        for path, flag in ((self.tls_certificate, "--tls-certificate"), (self.tls_key, "--tls-key")):
            if path is not None and not path.is_file():
                raise ConfigError(f"{flag} {path}: no such file; give one in PEM format")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Values from a container's environment: settings that flags override, and additional routes."""

    settings: Mapping[str, object] = field(default_factory=dict)
    routes: Mapping[str, str] = field(default_factory=dict)
    """Path -> name of the dialect."""
    ready_path: str = ""
    """An additional path that answers like /ready."""


def read_environment(variables: Mapping[str, str]) -> Environment:
    """Reads AIP_STORAGE_URI, AIP_HTTP_PORT, AIP_PREDICT_ROUTE, AIP_HEALTH_ROUTE and CAPPY_ALLOWED_HOSTS.

    The first four are set by Vertex AI. If AIP_HTTP_PORT is set, the service listens on all addresses under any host
    name, since it is behind the platform's proxy. Raises ConfigError for an invalid value.
    """
    scorer, port = variables.get("AIP_STORAGE_URI", "").rstrip("/"), variables.get("AIP_HTTP_PORT", "")
    if port and not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"AIP_HTTP_PORT: {quote(port)} is not a port; give 0 to 65535, or leave it unset")
    values: dict[str, object] = {"scorer": scorer} if scorer else {}
    if port:
        values |= {"host": "0.0.0.0", "port": int(port), "allowed_hosts": (ANY,)}  # noqa: S104 (a container's only way to be reached)
    if hosts := hosts_from_environment(variables):
        values["allowed_hosts"] = hosts
    predict, health = _read_route(variables, "AIP_PREDICT_ROUTE"), _read_route(variables, "AIP_HEALTH_ROUTE")
    return Environment(settings=values, routes={predict: "vertex"} if predict else {}, ready_path=health)


def hosts_from_environment(variables: Mapping[str, str]) -> tuple[str, ...]:
    """Reads the comma-separated names in CAPPY_ALLOWED_HOSTS; raises ConfigError for an invalid one."""
    hosts = _split_values([variables.get(HOSTS_VARIABLE, "")])
    _check_hosts(HOSTS_VARIABLE, hosts)
    return tuple(hosts)


def _read_route(variables: Mapping[str, str], name: str) -> str:
    route = variables.get(name, "")
    if route and (not route.startswith("/") or set(route) & set("{}?# ")):
        raise ConfigError(f"{name}: {quote(route)} is not a path; give one such as /predict")
    return route


def _split_values(values: Iterable[str]) -> list[str]:
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def _check_hosts(source: str, names: Iterable[str]) -> None:
    for name in names:
        if name != ANY and not _HOST.fullmatch(name):
            remedy = "give a name without a port such as scores.example or *.example, or * for any"
            raise ConfigError(f"{source} {quote(name)}: not a host name; {remedy}")
