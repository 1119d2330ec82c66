"""Small scorers that make large language models better.

Importing `cappy` alone is light: torch, transformers and mlflow load in the room that needs them.
"""

__version__ = "0.1.0"
