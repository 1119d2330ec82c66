"""Serves a scorer: python -m serving --scorer models:/cappy@champion --host 0.0.0.0 --port 8080."""

import sys

from cappy.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
