"""Paired differences as a report has them, for tests that need no report of their own."""

from typing import Any


def difference(low: float, value: float | None = None, **changes: Any) -> dict[str, Any]:
    """A difference whose 95% interval begins at `low`, on 100 groups."""
    middle = low + 0.05 if value is None else value
    return {
        "difference": middle,
        "low": low,
        "high": 2 * middle - low,
        "p_value": 0.001 if low > 0 else 0.5,
        "standard_error": (middle - low) / 1.984,
        "skewness": 0.0,
        "freedom": 99.0,
        "groups": 100,
        **changes,
    }
