"""The service with a function in place of a scorer, as a process: python serve_function.py PORT."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from scoring_function import FakeEngine, model  # noqa: E402 (found by the line above)

from serving import server  # noqa: E402
from serving.config import ServeConfig  # noqa: E402

if __name__ == "__main__":
    server.serve(lambda: model(FakeEngine()), ServeConfig(port=int(sys.argv[1])))
