"""The dialects that the service speaks; where two share a path, the fields of a body decide, in this order."""

from collections.abc import Sequence

from serving.dialects.dialect import Dialect, Scored, ranked
from serving.dialects.own import SCORE, SELECT

__all__ = ["DIALECTS", "Dialect", "Scored", "ranked"]

DIALECTS: Sequence[Dialect] = (SCORE, SELECT)
