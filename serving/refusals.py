"""Requests that get no score: a status and one line, which every dialect puts into its own shape."""


class Refusal(Exception):  # noqa: N818 (not an error of ours)
    """Status 4xx or 5xx with what was wrong and what to do, in one line; `retry_after` in whole seconds."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
