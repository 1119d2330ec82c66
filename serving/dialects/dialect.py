"""What a dialect is: the shapes of one kind of client, around pairs and scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from cappy.scoring.encoding import Pair
from serving.bodies import Bounds
from serving.config import Limits
from serving.engine import Models

NonEmptyText = Annotated[str, Field(min_length=1)]
"""A text that may not be empty."""
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
"""Texts, at least one; the error names the first item that is not a text, not every one."""
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
ModelName = Annotated[str | None, Field(description="The model's name or version; none means the one that is served")]


class Body(BaseModel):
    """A request or an answer; a field that is not named in a dialect is wrong usage, not silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RefusalResponse(BaseModel):
    """A refusal; beside the fields of its dialect it may have those of others that share the path."""


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """What came of a request: a score and a logit for each of its pairs, in order, and who gave them."""

    scores: Sequence[float]
    logits: Sequence[float]
    expected: Sequence[float] | None
    """The label to expect of each, 0 to 1, were it the best of its pool; None where the scorer has no calibration."""
    tokens: int
    model: str
    version: str
    sha256: str
    request_id: str


@dataclass(frozen=True, kw_only=True)
class ServedModels:
    """What the GET routes of a dialect tell its clients of."""

    models: Models
    limits: Limits
    batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One kind of client.

    `paths` may hold `{model}` and `{version}`. On a path of several dialects a body belongs to the first one of whose
    `marks` it has one. `pairs` reads a request, `answer` writes what came of it, `refuse` says (status, message) in the
    dialect's shape. `named` gives the model that a request asks for, if it may name one.
    """

    name: str
    paths: Sequence[str]
    request: type[BaseModel]
    response: type[BaseModel]
    problem: type[BaseModel]
    pairs: Callable[[Any], Sequence[Pair]]
    answer: Callable[[Any, ScoredPairs], BaseModel]
    refuse: Callable[[int, str], Mapping[str, object]]
    shape: str
    """The shortest right body, for whoever sent another."""
    marker_fields: frozenset[str] = frozenset()
    invalid_status: int = 422
    """Status of a body that is JSON of another shape."""
    one_pool: bool = False
    """Whether the pairs of a request are the candidates of one pool, of which the best is asked for."""
    exclude_none: bool = False
    """Whether answers leave out fields without a value, rather than give null."""
    requested_model: Callable[[Any], str | None] = lambda request: None
    forbids_truncation: Callable[[Any], bool] = lambda request: False
    """Whether a request asks that a pair is refused rather than cut where it is longer than the scorer reads."""
    content_types: frozenset[str] = frozenset()
    """Content types that a body may have beside JSON's; "" is none at all."""
    parse: Callable[[bytes, Mapping[str, str], Bounds], object] = lambda body, headers, bounds: bounds.parse(body)
    """A body, given with its headers, as JSON; Refusal where it is out of bounds, ValueError where it is not JSON."""
    add_routes: Callable[[FastAPI, ServedModels], None] | None = None
    """Adds what else its clients ask for, such as what is served: GET routes that need no key."""


def rank_pairs(result: ScoredPairs, values: Sequence[float], top: int | None = None) -> list[tuple[int, float]]:
    """(index, value) of the pairs, best first by their logits, the first of equal ones first; the best `top` alone."""
    order = sorted(range(len(values)), key=lambda index: -result.logits[index])
    return [(index, values[index]) for index in order[:top]]
