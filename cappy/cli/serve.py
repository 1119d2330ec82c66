"""`cappy serve` and `cappy gateway`: flags from the config class in `serving`, which only these verbs import."""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from cappy.cli.flags import parameters
from cappy.config import build
from cappy.errors import ConfigError

SERVE_HELP = """Serve a scorer over HTTP: POST /score {"pairs": [[instruction, response], ...]}, GET /health,
GET /ready.

Loads and verifies the scorer, then listens until SIGTERM (status 0) or Ctrl-C (status 130). In a container of Vertex
AI, AIP_STORAGE_URI, AIP_HTTP_PORT, AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE say what no flag does.
"""
GATEWAY_HELP = """Put best-of-n in front of an LLM: change one base URL, and POST /v1/chat/completions answers with
the best.

Samples several candidates from the LLM, scores them and gives the best. Listens until SIGTERM (status 0) or Ctrl-C
(status 130). docs/guides/gateway.md says what it does with each parameter.
"""
RENAMED = {
    "--follow": "--follow-seconds",
    "--price-prompt": "--price-input",
    "--price-completion": "--price-output",
    "--escalate-price-prompt": "--escalate-price-input",
    "--escalate-price-completion": "--escalate-price-output",
}
"""Flag of an earlier release -> its name now."""
PACKAGES = ("fastapi", "uvicorn", "starlette", "prometheus_client")


class _Command(TyperCommand):
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Refuses the names that flags had before, in one line, with status 2."""
        for word in args:
            now = RENAMED.get(word.partition("=")[0])
            if now in {name for parameter in self.params for name in parameter.opts}:
                typer.echo(f"{ctx.command_path}: {word.partition('=')[0]} is now {now}", err=True)
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


def service_command(verb: str) -> Any:
    """The command `cappy serve` or `cappy gateway`: one flag per field of its config class."""
    return _serve_command() if verb == "serve" else _gateway_command()


def _serve_command() -> Any:
    from serving.config import ServeConfig, read_environment

    def serve(given: Mapping[str, Any]) -> None:
        environment = read_environment(os.environ)
        config = build(ServeConfig, {**environment.settings, **given})
        try:
            from serving.server import run
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        run(config, environment)

    return _command("serve", SERVE_HELP, ServeConfig, serve)


def _gateway_command() -> Any:
    from serving.config import hosts_of_environment
    from serving.gateway.config import GatewayConfig

    def gateway(given: Mapping[str, Any]) -> None:
        config = build(GatewayConfig, {"allowed_hosts": hosts_of_environment(os.environ), **given})
        try:
            from serving.gateway.server import run
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        run(config)

    return _command("gateway", GATEWAY_HELP, GatewayConfig, gateway)


def _missing(error: ModuleNotFoundError) -> Exception:
    """The error with its remedy where a package of the extra is missing, else the error itself."""
    if error.name not in PACKAGES:
        return error
    return ConfigError(f"{error.name} is not installed; install the serve extra: pip install -e '.[serve]'")


def _command(name: str, text: str, config_class: type[Any], run: Callable[[Mapping[str, Any]], None]) -> Any:
    def verb(*, context: typer.Context, **values: Any) -> None:
        sources = {flag: context.get_parameter_source(flag) for flag in values}
        run({flag: value for flag, value in values.items() if (source := sources[flag]) and source.name != "DEFAULT"})

    asked = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    signature = inspect.Signature([asked, *parameters(config_class)])
    verb.__signature__ = signature  # type: ignore[attr-defined]
    verb.__annotations__ = {flag: parameter.annotation for flag, parameter in signature.parameters.items()}
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name, help=text, cls=_Command)(verb)
    return typer.main.get_command(single)
