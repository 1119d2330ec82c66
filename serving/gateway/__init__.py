"""A gateway that speaks OpenAI's chat completions: n samples of an LLM, the best of them by a scorer."""

from serving.gateway.app import create_app
from serving.gateway.server import Settings, run

__all__ = ["Settings", "create_app", "run"]
