"""`cappy gateway`: starts the gateway, which only this verb imports."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cappy.cli.serve import EXTRA, AllowedHosts, AllowOrigin, ApiKeys, MaxCharacters, MaxText
from cappy.errors import ConfigError


def gateway(
    upstream: Annotated[str, typer.Option(help="The LLM's OpenAI-compatible server: http://host:port/v1.")],
    scorer: Annotated[
        str, typer.Option(help="Scorer: a spec as in cappy serve, or http://host:port of a running cappy serve.")
    ] = "models:/cappy@champion",
    scorer_key_variable: Annotated[
        str,
        typer.Option(help="Environment variable with an API key of that cappy serve.", show_default="none"),
    ] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Folder with calibration.json, where the scorer's own has none.", show_default="none"),
    ] = None,
    key_variable: Annotated[
        str,
        typer.Option(
            help="Environment variable with the LLM's key; left out, clients' own are passed on.", show_default="none"
        ),
    ] = "",
    candidates: Annotated[int, typer.Option(min=1, max=128, help="Most candidates for a request.")] = 8,
    round_size: Annotated[int, typer.Option(min=1, help="Candidates asked for at once.")] = 4,
    threshold: Annotated[
        float | None, typer.Option(help="Score from which no more are sampled.", show_default="none")
    ] = None,
    min_gain: Annotated[
        float, typer.Option(min=0, help="Stop where another sample is expected to raise the best score by less.")
    ] = 0.01,
    floor: Annotated[
        float | None,
        typer.Option(help="Score below which the answer is a refusal, or a second LLM is asked.", show_default="none"),
    ] = None,
    escalate_to: Annotated[
        str, typer.Option(help="Server of the second LLM, asked below --floor.", show_default="none")
    ] = "",
    escalate_model: Annotated[
        str, typer.Option(help="Model of the second LLM; left out, the client's.", show_default="none")
    ] = "",
    escalate_key_variable: Annotated[
        str, typer.Option(help="Environment variable with the second LLM's key.", show_default="none")
    ] = "",
    escalate_candidates: Annotated[int, typer.Option(min=1, help="Most candidates of the second LLM.")] = 1,
    strip_reasoning: Annotated[
        bool,
        typer.Option(
            "--strip-reasoning",
            help="Score and answer what follows the LLM's reasoning (<think>...</think> and other markup) alone.",
            show_default="off",
        ),
    ] = False,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for a request, in seconds.")] = 60.0,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Most completion tokens for a request, all candidates together; 0: no limit.")
    ] = 0,
    max_cost: Annotated[float, typer.Option(min=0, help="Most money for a request; 0: no limit.")] = 0.0,
    max_total_cost: Annotated[
        float, typer.Option(min=0, help="Most money for all requests until it is started again; 0: no limit.")
    ] = 0.0,
    price_prompt: Annotated[float, typer.Option(min=0, help="Price of a million prompt tokens.")] = 0.0,
    price_completion: Annotated[float, typer.Option(min=0, help="Price of a million completion tokens.")] = 0.0,
    escalate_price_prompt: Annotated[float, typer.Option(min=0, help="The same of the second LLM.")] = 0.0,
    escalate_price_completion: Annotated[float, typer.Option(min=0, help="The same of the second LLM.")] = 0.0,
    feedback: Annotated[
        Path | None,
        typer.Option(help="Folder to keep every answer in, its texts included.", show_default="none, nothing is kept"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes any free one.")] = 8090,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, help="Largest request body in megabytes; larger ones get status 413.")
    ] = 8.0,
    max_values: Annotated[
        int, typer.Option(min=100, help="Most JSON values in a request body; more get status 413.")
    ] = 10_000,
    max_characters: MaxCharacters = 200_000,
    max_text_mb: MaxText = 2.0,
    api_keys: ApiKeys = None,
    allow_origin: AllowOrigin = None,
    allowed_hosts: AllowedHosts = None,
    notice: Annotated[
        float, typer.Option(min=0, help="Seconds after SIGTERM in which it is not ready but still answers.")
    ] = 1.0,
    grace: Annotated[int, typer.Option(min=1, help="Seconds after that in which what was accepted is finished.")] = 30,
) -> None:
    """Put best-of-n in front of an LLM: change one base URL, and POST /v1/chat/completions answers with the best.

    Samples several candidates from the LLM, scores them and gives the best. Listens until SIGTERM (status 0) or Ctrl-C
    (status 130). docs/guides/gateway.md says what it does with each parameter.
    """
    try:
        from serving import Address
        from serving.bodies import Bounds
        from serving.browsers import VARIABLE, check_origins, read_hosts
        from serving.gateway import Settings, run
        from serving.gateway.ledger import Limits, Prices
        from serving.gateway.llm import key_of, llm
        from serving.gateway.policy import Policy
        from serving.keys import read_keys
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette", "prometheus_client"):
            raise
        raise ConfigError(f"{error.name} is not installed; install the serve extra: {EXTRA}") from error
    if (floor is None and escalate_to) or (not escalate_to and (escalate_model or escalate_key_variable)):
        raise ConfigError("a second LLM is asked below --floor at --escalate-to; give both, or neither")
    if scorer_key_variable and not scorer.startswith(("http://", "https://")):
        raise ConfigError(
            "--scorer-key-variable: is for a running service; give its address, --scorer http://host:port"
        )
    if (max_cost or max_total_cost) and not (price_prompt or price_completion):
        raise ConfigError("limits on money need prices; give --price-prompt and --price-completion")
    check_origins(allow_origin or ())
    hosts = read_hosts(allowed_hosts or (), os.environ.get(VARIABLE, ""))
    settings = Settings(
        llm=llm(upstream, key_variable=key_variable, prices=Prices(prompt=price_prompt, completion=price_completion)),
        scorer=scorer,
        scorer_key=key_of(scorer, scorer_key_variable),
        calibration=calibration,
        policy=Policy(
            candidates=candidates, round_size=round_size, threshold=threshold, min_gain=min_gain, floor=floor
        ),
        limits=Limits(seconds=max_seconds, tokens=max_tokens, money=max_cost, total_money=max_total_cost),
        second=llm(
            escalate_to,
            model=escalate_model,
            key_variable=escalate_key_variable,
            # Whose server it is nobody knows, so a client's key is not sent there.
            passes_key=False,
            prices=Prices(prompt=escalate_price_prompt, completion=escalate_price_completion),
        )
        if escalate_to
        else None,
        second_candidates=escalate_candidates,
        strip_reasoning=strip_reasoning,
        feedback=feedback,
        max_body_bytes=round(max_body_mb * 1e6),
        bounds=Bounds(
            max_values=max_values,
            max_characters=max_characters,
            max_text_bytes=round(max_text_mb * 1e6),
            remedy="send a shorter conversation",
        ),
        keys=read_keys(api_keys),
        origins=allow_origin or (),
    )
    run(settings, Address(host=host, port=port, notice_seconds=notice, grace_seconds=grace, allowed_hosts=hosts))
