"""Small scorers that make large language models better.

Importing `cappy` alone is light: torch, transformers and mlflow load where they are needed.
"""

__version__ = "0.1.0"
