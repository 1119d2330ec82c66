"""Selection: picks one of several responses.

`Selector` is the fitted rule that a scorer is evaluated, registered and served with. All selectors that it is compared
with are in `cappy.selection.selectors.SELECTORS`. To add one, add an entry there and a test.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cappy.selection.linear import Candidates, Selector, read_selector, require_selector

__all__ = ["Candidates", "Selector", "read_selector", "require_selector"]


def __getattr__(name: str) -> object:
    """Imports numpy at the first use, not with this package."""
    if name in __all__:
        from cappy.selection import linear

        return getattr(linear, name)
    raise AttributeError(name)
