"""Settings of `cappy gateway`; every field is a flag. Each group is the config of one part of the gateway."""

import math
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from cappy.config import ADVANCED, Renames, settings
from cappy.errors import ConfigError
from serving.config import DEFAULT_SCORER, AccessConfig, BodyLimits, ListenerConfig, Port


@settings
class LlmConfig:
    """The LLM's server, key and prices; prices are per million tokens."""

    RENAMED: ClassVar[Renames] = {"price_prompt": "price_input", "price_completion": "price_output"}

    upstream: Annotated[str, Field(description="The LLM's OpenAI-compatible server: http://host:port/v1")]
    key_variable: Annotated[
        str, Field(description="Environment variable with the LLM's key; default: clients' own keys are passed on")
    ] = ""
    price_input: Annotated[float, Field(ge=0, description="Price per million prompt tokens")] = 0.0
    price_output: Annotated[float, Field(ge=0, description="Price per million response tokens")] = 0.0


@settings
class ScorerSource:
    """The scorer: in this process, or a running `cappy serve`."""

    scorer: Annotated[
        str, Field(description="Scorer: a spec as in cappy serve, or http://host:port of a running cappy serve")
    ] = DEFAULT_SCORER
    scorer_key_variable: Annotated[
        str, ADVANCED, Field(description="Environment variable with an API key of the running cappy serve")
    ] = ""
    calibration: Annotated[
        Path | None, ADVANCED, Field(description="Folder with calibration.json; default: the scorer's own folder")
    ] = None
    selector: Annotated[
        Path | None, ADVANCED, Field(description="Folder with selector.json; default: the scorer's own folder")
    ] = None


@settings
class Policy:
    """How many candidates to sample and when to stop early.

    If there are several candidates and `greedy` is true, the first one is decoded greedily (temperature 0), because a
    selector may know how good the LLM's greedy response is. Sampling stops at a score of `threshold` (None: never), and
    when another sample is expected to raise the best score by less than `min_gain` (0: never). If the score of the pick
    is below `floor`, the answer is a refusal or comes from the second LLM (None: never).
    """

    candidates: Annotated[int, Field(ge=1, le=128, description="Maximum candidates per request")] = 8
    greedy: Annotated[
        bool,
        ADVANCED,
        Field(description="Decode one of several candidates greedily (temperature 0), in a call of its own"),
    ] = True
    round_size: Annotated[int, ADVANCED, Field(ge=1, description="Candidates requested at once")] = 4
    threshold: Annotated[float | None, Field(description="Stop sampling once the score of the pick reaches this")] = (
        None
    )
    min_gain: Annotated[
        float,
        ADVANCED,
        Field(ge=0, description="Stop when another sample is expected to raise the best score by less than this"),
    ] = 0.01
    floor: Annotated[
        float | None, Field(description="If the best score is lower: refuse, or ask the second LLM (--escalate-to)")
    ] = None

    def __post_init__(self) -> None:
        for name in ("threshold", "floor"):
            if math.isnan(getattr(self, name) or 0.0):
                raise ConfigError(f"--{name}: expected a number, got nan; give a number or leave the flag out")
        if self.threshold is not None and self.floor is not None and self.floor > self.threshold:
            text = f"--floor {self.floor:g} is above --threshold {self.threshold:g}"
            raise ConfigError(f"{text}: answers that reach the threshold would be refused; lower --floor")


@settings
class EscalationConfig:
    """The second LLM, which is asked if the best score is below `floor`."""

    RENAMED: ClassVar[Renames] = {
        "escalate_price_prompt": "escalate_price_input",
        "escalate_price_completion": "escalate_price_output",
    }

    escalate_to: Annotated[str, ADVANCED, Field(description="Server of the second LLM, used below --floor")] = ""
    escalate_model: Annotated[str, ADVANCED, Field(description="Model of the second LLM; default: the client's")] = ""
    escalate_key_variable: Annotated[
        str, ADVANCED, Field(description="Environment variable with the second LLM's key")
    ] = ""
    escalate_candidates: Annotated[int, ADVANCED, Field(ge=1, description="Maximum candidates of the second LLM")] = 1
    escalate_price_input: Annotated[
        float, ADVANCED, Field(ge=0, description="Price per million prompt tokens of the second LLM")
    ] = 0.0
    escalate_price_output: Annotated[
        float, ADVANCED, Field(ge=0, description="Price per million response tokens of the second LLM")
    ] = 0.0


@settings
class SpendingLimits:
    """Limits per request on time, and on tokens and cost of all its candidates; and a limit on the total cost.

    0 means no limit, except for `max_seconds`.
    """

    max_seconds: Annotated[float, Field(ge=0.1, allow_inf_nan=False, description="Maximum seconds per request")] = 60.0
    max_tokens: Annotated[
        int, Field(ge=0, description="Maximum completion tokens per request, all candidates together; 0: no limit")
    ] = 0
    max_cost: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Maximum cost per request; 0: no limit")
    ] = 0.0
    max_total_cost: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Maximum cost of all requests until the gateway is restarted; 0: no limit",
        ),
    ] = 0.0


@settings
class ChatLimits(BodyLimits):
    """Limits of a request body.

    Each message uses three JSON values (object, role, content), so the default allows about 3,300 messages.
    """

    max_values: Annotated[
        int, ADVANCED, Field(ge=100, description="Maximum JSON values in a request body; more get status 413")
    ] = 10_000


@settings
class GatewayConfig(
    ChatLimits, AccessConfig, ListenerConfig, SpendingLimits, EscalationConfig, Policy, ScorerSource, LlmConfig
):
    """Settings of `cappy gateway`."""

    port: Port = 8090
    strip_reasoning: Annotated[
        bool,
        Field(
            description="Remove the LLM's reasoning (<think>...</think> and other markup) before scoring and answering"
        ),
    ] = False
    feedback: Annotated[
        Path | None, Field(description="Folder to store answers with their texts in; default: nothing is stored")
    ] = None

    def __post_init__(self) -> None:
        AccessConfig.__post_init__(self)
        Policy.__post_init__(self)
        second_llm_setting = self.escalate_model or self.escalate_key_variable
        if (self.floor is None and self.escalate_to) or (not self.escalate_to and second_llm_setting):
            needs = "--escalate-to needs --floor, and the other --escalate flags need --escalate-to"
            raise ConfigError(f"{needs}; add the missing flag, or remove the --escalate flags")
        if self.scorer_key_variable and not self.scorer.startswith(("http://", "https://")):
            raise ConfigError(
                "--scorer-key-variable: only used with a running service; give its address: --scorer http://host:port"
            )
        if (self.max_cost or self.max_total_cost) and not (self.price_input or self.price_output):
            raise ConfigError("--max-cost and --max-total-cost need prices; give --price-input and --price-output")
