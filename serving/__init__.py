"""The HTTP service that serves a scorer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.app import Options, create_app
    from serving.config import ServeConfig
    from serving.server import run

__all__ = ["Options", "ServeConfig", "create_app", "run"]


def __getattr__(name: str) -> object:
    """Imports FastAPI on first use, so that importing the settings is fast."""
    if name == "ServeConfig":
        from serving.config import ServeConfig

        return ServeConfig
    if name in ("Options", "create_app"):
        from serving import app

        value: object = getattr(app, name)
        return value
    if name == "run":
        from serving.server import run

        return run
    raise AttributeError(name)
