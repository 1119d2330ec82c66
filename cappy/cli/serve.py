"""`cappy serve`: starts the HTTP service, which only this verb imports."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cappy.errors import ConfigError
from cappy.scoring import Precision

EXTRA = "pip install -e '.[serve]'"

MaxCharacters = Annotated[
    int, typer.Option(min=1, help="Most characters of a text; a longer one, or a longer conversation, is refused.")
]
MaxText = Annotated[
    float, typer.Option(min=0.001, help="Most megabytes (UTF-8) of all texts of a request; more get status 413.")
]
ApiKeys = Annotated[
    Path | None,
    typer.Option(help="File of API keys, one a line; # begins a comment.", show_default="CAPPY_API_KEYS, by commas"),
]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        help="Origin whose pages may ask from a browser (CORS), * for any; repeat for several.", show_default="none"
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        help="Name that clients may ask for it by (Host header), * for any; repeat for several.",
        show_default="CAPPY_ALLOWED_HOSTS, by commas, beside those of its address",
    ),
]


def serve(
    scorer: Annotated[
        str | None,
        typer.Option(
            help="Scorer: models:/name@alias, models:/name/version, builtin, a folder, hub:org/name@revision or "
            "a bucket's folder (gs://).",
            show_default="AIP_STORAGE_URI, else models:/cappy@champion",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; 0.0.0.0 lets other machines in.",
            show_default="127.0.0.1, or 0.0.0.0 with AIP_HTTP_PORT",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="TCP port; 0 takes any free one.", show_default="AIP_HTTP_PORT, else 8080"),
    ] = None,
    follow: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds between looks at the alias; 0: none.", show_default="30 for an alias"),
    ] = None,
    model_name: Annotated[str, typer.Option(help="Name that clients ask for.", show_default="the scorer's own")] = "",
    precision: Annotated[
        Precision, typer.Option(help="What the body runs in; auto: bf16 where the device has instructions for it.")
    ] = "auto",
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, help="Largest request body in megabytes; larger ones get status 413.")
    ] = 8.0,
    max_pairs: Annotated[int, typer.Option(min=1, help="Most pairs in a request; more get status 413.")] = 1024,
    max_characters: MaxCharacters = 200_000,
    max_text_mb: MaxText = 2.0,
    max_queued_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens that wait before requests get status 429; 0: 32 batches.")
    ] = 0,
    batch_tokens: Annotated[
        int,
        typer.Option(min=0, help="Tokens of a batch: fewer answer sooner, more do more; 0: what suits the device."),
    ] = 0,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a request may take; a longer one gets status 504.")
    ] = 60.0,
    api_keys: ApiKeys = None,
    allow_origin: AllowOrigin = None,
    allowed_hosts: AllowedHosts = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM), to serve HTTPS.", show_default="none")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Private key of the certificate (PEM).", show_default="none")
    ] = None,
    notice: Annotated[
        float, typer.Option(min=0, help="Seconds after SIGTERM in which it is not ready but still answers.")
    ] = 1.0,
    grace: Annotated[int, typer.Option(min=1, help="Seconds after that in which what was accepted is finished.")] = 30,
) -> None:
    """Serve a scorer over HTTP: POST /score {"pairs": [[instruction, response], ...]}, GET /health, GET /ready.

    Loads and verifies the scorer, then listens until SIGTERM (status 0) or Ctrl-C (status 130). In a container of
    Vertex AI, AIP_STORAGE_URI, AIP_HTTP_PORT, AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE say what no flag does.
    """
    try:
        import serving
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette", "prometheus_client"):
            raise
        raise ConfigError(f"{error.name} is not installed; install the serve extra: {EXTRA}") from error
    from serving import environment
    from serving.browsers import VARIABLE, check_origins, read_hosts
    from serving.keys import read_keys
    from serving.service import Limits
    from serving.webhook import read_secret

    told = environment.read(os.environ)
    check_origins(allow_origin or ())
    hosts = read_hosts(allowed_hosts or (), os.environ.get(VARIABLE, "")) or told.allowed_hosts
    limits = Limits(
        max_body_bytes=round(max_body_mb * 1e6),
        max_pairs=max_pairs,
        max_characters=max_characters,
        max_text_bytes=round(max_text_mb * 1e6),
        seconds=timeout,
    )
    options = serving.Options(
        limits=limits,
        max_queued_tokens=max_queued_tokens,
        keys=read_keys(api_keys),
        origins=allow_origin or (),
        routes=told.routes,
        ready_path=told.ready_path,
        webhook_secret=read_secret(),
    )
    address = serving.Address(
        host=told.host if host is None else host,
        port=told.port if port is None else port,
        certificate=tls_certificate,
        key=tls_key,
        notice_seconds=notice,
        grace_seconds=grace,
        allowed_hosts=hosts,
    )
    with environment.local(scorer or told.scorer) as place:
        serving.run(
            place,
            address,
            options,
            name=model_name,
            precision=precision,
            batch_tokens=batch_tokens,
            follow=follow,
        )
