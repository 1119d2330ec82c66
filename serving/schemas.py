"""What goes over the wire, apart from what the library works with."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _whole(text: str) -> str:
    """JSON can escape half a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character (lone surrogate) at position {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
Pair = Annotated[tuple[Text, Text], Field(description="An instruction and a response to it, in this order")]


class ScoreRequest(BaseModel):
    """Pairs to score."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"pairs": [["What is the capital of France?", "Paris"]]}]},
    )

    pairs: Annotated[list[Pair], Field(min_length=1, description="[instruction, response] pairs, at least one")]


class ScoreResponse(BaseModel):
    """One score per pair."""

    scores: Annotated[list[float], Field(description="In the order of the pairs; higher is more correct, about 0 to 1")]
    version: Annotated[str, Field(description="Version of the scorer: 12 hexadecimal digits of its manifest's hash")]


class Health(BaseModel):
    """That the process lives."""

    status: Annotated[str, Field(description="Always ok")] = "ok"


class Readiness(BaseModel):
    """Whether scores can be had."""

    ready: Annotated[bool, Field(description="Whether the scorer has answered its probe")]
    version: Annotated[str, Field(description="Version of the scorer")]
    reason: Annotated[str, Field(description="Why not, if not")] = ""


class Problem(BaseModel):
    """What was wrong with a request."""

    detail: Annotated[str, Field(description="What was wrong and what to do, in one line")]
