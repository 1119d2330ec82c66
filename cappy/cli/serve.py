"""`cappy serve` and `cappy gateway`: flags from the config classes in `serving`, which only these verbs import."""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from cappy.cli.flags import explicit_values, make_command, parameters
from cappy.config import build, renamed_flags
from cappy.errors import ConfigError

SERVE_HELP = """Serve a scorer over HTTP: POST /score {"pairs": [[instruction, response], ...]}, GET /health,
GET /ready.

Loads and verifies the scorer, then listens until SIGTERM (status 0) or Ctrl-C (status 130). On Vertex AI,
AIP_STORAGE_URI and AIP_HTTP_PORT apply if no flag is given; AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE set the paths.
"""
GATEWAY_HELP = """OpenAI-compatible proxy that samples several responses from an LLM and returns the best. Point your
client's base URL at it; POST /v1/chat/completions works as before.

Listens until SIGTERM (status 0) or Ctrl-C (status 130). docs/guides/gateway.md describes how it handles each
parameter.
"""
PACKAGES = ("fastapi", "uvicorn", "starlette", "prometheus_client")


def service_command(verb: str) -> TyperCommand:
    """The command `cappy serve` or `cappy gateway`: one flag per field of its config class."""
    return _serve_command() if verb == "serve" else _gateway_command()


def _serve_command() -> TyperCommand:
    from serving.config import ServeConfig, read_environment

    def serve(flags: Mapping[str, Any]) -> None:
        environment = read_environment(os.environ)
        if flags.get("scorer") == "":  # A Kubernetes manifest may pass an unset variable.
            flags = {name: value for name, value in flags.items() if name != "scorer"}
        config = build(ServeConfig, {**environment.settings, **flags})
        with _require_extra():
            from serving.server import run
        run(config, environment)

    return _command("serve", SERVE_HELP, ServeConfig, serve)


def _gateway_command() -> TyperCommand:
    from serving.config import hosts_from_environment
    from serving.gateway.config import GatewayConfig

    def gateway(flags: Mapping[str, Any]) -> None:
        config = build(GatewayConfig, {"allowed_hosts": hosts_from_environment(os.environ), **flags})
        with _require_extra():
            from serving.gateway.server import run
        run(config)

    return _command("gateway", GATEWAY_HELP, GatewayConfig, gateway)


@contextlib.contextmanager
def _require_extra() -> Iterator[None]:
    """ConfigError that names the extra if one of its packages is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise ConfigError(
            f"{error.name} is not installed; install the serve extra: pip install -e '.[serve]'"
        ) from error


def _command(name: str, text: str, config_class: type[Any], run: Callable[[Mapping[str, Any]], None]) -> TyperCommand:
    def verb(*, context: typer.Context, **values: Any) -> None:
        run(explicit_values(context, values))

    context_parameter = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    return make_command(name, text, verb, [context_parameter, *parameters(config_class)], renamed_flags(config_class))
