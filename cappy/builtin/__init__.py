"""The embedded default: procedural tasks and a very small LLM, so that everything runs offline."""

from pathlib import Path

from cappy.builtin.verification import verify

LLM_FOLDER = Path(__file__).parent / "weights" / "llm"
SCORER_FOLDER = Path(__file__).parent / "weights" / "scorer"

__all__ = ["LLM_FOLDER", "SCORER_FOLDER", "verify"]
