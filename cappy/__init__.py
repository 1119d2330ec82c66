"""Small scorers that improve large language models.

Importing `cappy` is light: torch, transformers and mlflow are imported where they are needed.
"""

__version__ = "0.1.0"
