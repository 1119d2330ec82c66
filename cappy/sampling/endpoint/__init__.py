"""An LLM behind an OpenAI-compatible endpoint: no answer is lost, none is paid for twice."""

from cappy.sampling.endpoint.generator import Endpoint

__all__ = ["Endpoint"]
