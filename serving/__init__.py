"""The HTTP service around a scorer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.app import Options, create_app
    from serving.config import ServeConfig
    from serving.server import run

__all__ = ["Options", "ServeConfig", "create_app", "run"]


def __getattr__(name: str) -> Any:
    """Loads FastAPI with the first use of a name, not with the import of the settings."""
    if name == "ServeConfig":
        from serving.config import ServeConfig

        return ServeConfig
    if name in ("Options", "create_app"):
        from serving import app

        return getattr(app, name)
    if name == "run":
        from serving.server import run

        return run
    raise AttributeError(name)
