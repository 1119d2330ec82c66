"""Settings of `cappy gateway`: every field is a flag. The groups are what its parts take: a config is each of them."""

import math
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from cappy.config import ADVANCED, Renames, settings
from cappy.errors import ConfigError
from serving.config import DEFAULT_SCORER, AccessConfig, BodyLimits, ListenerConfig, Port


@settings
class LlmConfig:
    """The LLM; prices are money per million tokens."""

    RENAMED: ClassVar[Renames] = {"price_prompt": "price_input", "price_completion": "price_output"}

    upstream: Annotated[str, Field(description="The LLM's OpenAI-compatible server: http://host:port/v1")]
    key_variable: Annotated[
        str, Field(description="Environment variable with the LLM's key; without it clients' own are passed on")
    ] = ""
    price_input: Annotated[float, Field(ge=0, description="Price of a million tokens of prompts")] = 0.0
    price_output: Annotated[float, Field(ge=0, description="Price of a million tokens of responses")] = 0.0


@settings
class ScorerSource:
    """Where scores come from."""

    scorer: Annotated[
        str, Field(description="Scorer: a spec as in cappy serve, or http://host:port of a running cappy serve")
    ] = DEFAULT_SCORER
    scorer_key_variable: Annotated[
        str, ADVANCED, Field(description="Environment variable with an API key of that cappy serve")
    ] = ""
    calibration: Annotated[
        Path | None, ADVANCED, Field(description="Folder with calibration.json, where the scorer's own has none")
    ] = None


@settings
class Policy:
    """How many candidates at most, how many in a round, and when fewer are enough.

    `threshold` stops at a score that is good enough (None: never), `min_gain` where another sample is expected to
    raise the best score by less (0: never). Below `floor` the answer is not given as it is (None: always given).
    """

    candidates: Annotated[int, Field(ge=1, le=128, description="Most candidates for a request")] = 8
    round_size: Annotated[int, ADVANCED, Field(ge=1, description="Candidates asked for at once")] = 4
    threshold: Annotated[float | None, Field(description="Score from which no more are sampled")] = None
    min_gain: Annotated[
        float,
        ADVANCED,
        Field(ge=0, description="Stop where another sample is expected to raise the best score by less"),
    ] = 0.01
    floor: Annotated[
        float | None, Field(description="Score below which the answer is a refusal, or a second LLM is asked")
    ] = None

    def __post_init__(self) -> None:
        for name in ("threshold", "floor"):
            if math.isnan(getattr(self, name) or 0.0):
                raise ConfigError(f"--{name}: is not a number; give one, or leave it out")
        if self.threshold is not None and self.floor is not None and self.floor > self.threshold:
            what = f"--floor {self.floor:g} is above --threshold {self.threshold:g}"
            raise ConfigError(f"{what}: an answer that is good enough would be refused; lower --floor")


@settings
class EscalationConfig:
    """The second LLM, which is asked below `floor`."""

    RENAMED: ClassVar[Renames] = {
        "escalate_price_prompt": "escalate_price_input",
        "escalate_price_completion": "escalate_price_output",
    }

    escalate_to: Annotated[str, ADVANCED, Field(description="Server of the second LLM, asked below --floor")] = ""
    escalate_model: Annotated[str, ADVANCED, Field(description="Model of the second LLM; without it the client's")] = ""
    escalate_key_variable: Annotated[
        str, ADVANCED, Field(description="Environment variable with the second LLM's key")
    ] = ""
    escalate_candidates: Annotated[int, ADVANCED, Field(ge=1, description="Most candidates of the second LLM")] = 1
    escalate_price_input: Annotated[
        float, ADVANCED, Field(ge=0, description="Price of a million tokens of prompts of the second LLM")
    ] = 0.0
    escalate_price_output: Annotated[
        float, ADVANCED, Field(ge=0, description="Price of a million tokens of responses of the second LLM")
    ] = 0.0


@settings
class SpendingLimits:
    """Of one request: seconds, completion tokens and money over all its candidates; of all requests: money.

    0 means no limit, but for `max_seconds`, which is always one.
    """

    max_seconds: Annotated[
        float, Field(ge=0.1, allow_inf_nan=False, description="Longest time for a request, in seconds")
    ] = 60.0
    max_tokens: Annotated[
        int, Field(ge=0, description="Most completion tokens for a request, all candidates together; 0: no limit")
    ] = 0
    max_cost: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Most money for a request; 0: no limit")
    ] = 0.0
    max_total_cost: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Most money for all requests until it is started again; 0: no limit",
        ),
    ] = 0.0


@settings
class ChatLimits(BodyLimits):
    """What a body may be; one turn of a conversation has three values."""

    max_values: Annotated[
        int, ADVANCED, Field(ge=100, description="Most JSON values in a request body; more get status 413")
    ] = 10_000


@settings
class GatewayConfig(
    ChatLimits, AccessConfig, ListenerConfig, SpendingLimits, EscalationConfig, Policy, ScorerSource, LlmConfig
):
    """How the best of an LLM's samples is found and served."""

    port: Port = 8090
    strip_reasoning: Annotated[
        bool,
        Field(
            description="Score and answer what follows the LLM's reasoning (<think>...</think> and other markup) alone"
        ),
    ] = False
    feedback: Annotated[
        Path | None, Field(description="Folder to keep every answer in, its texts included; nothing is kept without it")
    ] = None

    def __post_init__(self) -> None:
        AccessConfig.__post_init__(self)
        Policy.__post_init__(self)
        alone = self.escalate_model or self.escalate_key_variable
        if (self.floor is None and self.escalate_to) or (not self.escalate_to and alone):
            raise ConfigError("a second LLM is asked below --floor at --escalate-to; give both, or neither")
        if self.scorer_key_variable and not self.scorer.startswith(("http://", "https://")):
            raise ConfigError(
                "--scorer-key-variable: is for a running service; give its address, --scorer http://host:port"
            )
        if (self.max_cost or self.max_total_cost) and not (self.price_input or self.price_output):
            raise ConfigError("limits on money need prices; give --price-input and --price-output")
