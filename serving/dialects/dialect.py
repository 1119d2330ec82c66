"""A dialect: the request and response shapes of one kind of client, mapped to pairs and scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from cappy.scoring.encoding import Pair
from cappy.selection.linear import Selector
from serving.bodies import Bounds
from serving.config import RequestLimits
from serving.engine import Models

NonEmptyText = Annotated[str, Field(min_length=1)]
"""A non-empty string."""
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
"""At least one string; an error names the first invalid item only."""
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
ModelName = Annotated[str | None, Field(description="The model's name or version; default: the current one")]


class Body(BaseModel):
    """A request or a response; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ErrorResponse(BaseModel):
    """The response to a refused request; it may also have the fields of other dialects that share the path."""


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """The result of a request: a score and a logit per pair, in order, and the scorer that computed them."""

    scores: Sequence[float]
    logits: Sequence[float]
    selector: Selector
    expected: Sequence[float] | None
    """Expected label of each pair, 0 to 1, if it is the best of its pool; None if the scorer has no calibration."""
    tokens: int
    model: str
    version: str
    sha256: str
    request_id: str


@dataclass(frozen=True, kw_only=True)
class ServedModels:
    """The served models and their limits, which the GET routes of a dialect describe."""

    models: Models
    limits: RequestLimits
    batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The API of one kind of client.

    `paths` may contain `{model}` and `{version}`. If several dialects share a path, a body belongs to the first dialect
    with a marker field in it. `pairs` reads the pairs of a request, and `answer` writes the response. `error_body`
    builds the body of an error from (status, message); its type is `error_response`. `requested_model` returns the
    model that a request names, or None.
    """

    name: str
    paths: Sequence[str]
    request: type[BaseModel]
    response: type[BaseModel]
    error_response: type[BaseModel]
    pairs: Callable[[Any], Sequence[Pair]]
    answer: Callable[[Any, ScoredPairs], BaseModel]
    error_body: Callable[[int, str], Mapping[str, object]]
    example_body: str
    """A minimal valid body, shown in errors."""
    marker_fields: frozenset[str] = frozenset()
    invalid_status: int = 422
    """Status for JSON of the wrong shape."""
    one_pool: bool = False
    """Whether the pairs of a request are the candidates of one pool, from which the best is selected."""
    exclude_none: bool = False
    """Whether responses omit fields without a value instead of writing null."""
    requested_model: Callable[[Any], str | None] = lambda request: None
    forbids_truncation: Callable[[Any], bool] = lambda request: False
    """Whether a request demands that pairs which are too long are refused instead of truncated."""
    content_types: frozenset[str] = frozenset()
    """Content types that are accepted in addition to JSON; "" means no content type."""
    parse: Callable[[bytes, Mapping[str, str], Bounds], object] = lambda body, headers, bounds: bounds.parse(body)
    """Parses a body, given its headers; raises Refusal if it is out of bounds, ValueError if it is not JSON."""
    add_routes: Callable[[FastAPI, ServedModels], None] | None = None
    """Adds GET routes that the dialect's clients use, such as model metadata; they need no key."""


def rank_pairs(result: ScoredPairs, values: Sequence[float], top: int | None = None) -> list[tuple[int, float]]:
    """(index, value) of the best `top` pairs (None: all), highest logit first, ties in input order.

    Pairs are ranked one by one; only `/select` picks by the selector, which compares the responses of a pool.
    """
    order = sorted(range(len(values)), key=lambda index: -result.logits[index])
    return [(index, values[index]) for index in order[:top]]
