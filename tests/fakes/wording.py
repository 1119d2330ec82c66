"""What an error must say: the input it is about and the remedy; the sentence around them is free to change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

Error = TypeVar("Error", bound=BaseException)


@contextmanager
def raises_naming(kind: type[Error], *parts: str) -> Iterator[pytest.ExceptionInfo[Error]]:
    """Holds that the block raises `kind`, whose text has each of `parts`: the input, the value, the flag to change."""
    with pytest.raises(kind) as caught:
        yield caught
    text = str(caught.value)
    del caught  # Its traceback holds this frame: the two would keep the error, and a socket that it holds, open.
    assert_names(text, *parts)


def assert_names(text: str, *parts: str) -> None:
    """Holds that a message has each of `parts`, in any order and any case."""
    missing = [part for part in parts if part.casefold() not in text.casefold()]
    assert not missing, f"{missing} not in: {text}"
