"""The HTTP service around a scorer."""

from serving.app import create_app
from serving.server import run

__all__ = ["create_app", "run"]
