"""The HTTP service around a scorer."""

from serving.app import Options, create_app
from serving.server import Address, run

__all__ = ["Address", "Options", "create_app", "run"]
