"""How the numbers of a data report are written; one that there is not is a dash, never NaN."""

from cappy.pages.words import percent

NOTHING = "–"


def label(value: float | None) -> str:
    """A label of 0 to 1, x 100."""
    return NOTHING if value is None else percent(value)


def share(value: float | None) -> str:
    """A share of 0 to 1 in percent, its sign beside it; what is not quite none or all does not read as such."""
    if value is None:
        return NOTHING
    if 0 < value < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 < value < 1 else f"{100 * value:.1f}%"


def part(some: int, of: int) -> str:
    """`share` of two counts."""
    return share(some / of if of else None)


def number(value: float | None) -> str:
    """A mean that is no share, such as responses per instance."""
    return NOTHING if value is None else f"{value:,.1f}"


def count(value: int | None) -> str:
    """A count, by thousands."""
    return NOTHING if value is None else f"{value:,}"
