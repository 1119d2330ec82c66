"""The child process of a local run: `python -m pipelines.execution REQUEST.json`, its output going to the run's log."""

import importlib
import json
import logging
import sys
from pathlib import Path

from kfp import local
from kfp.local import placeholder_utils

from cappy.steps import die_with_parent


def main(request: Path) -> int:
    """Runs the pipeline of the request on kfp's local runner; 1 if a step failed."""
    wanted = json.loads(request.read_text())
    die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s - %(levelname)s - %(message)s")
    # kfp draws eight random digits for a local run's id: two runs may share them, and whoever started it cannot know.
    placeholder_utils.make_random_id = lambda: wanted["run"]
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=wanted["pipeline_root"],
        workspace_root=str(request.parent / "workspace"),
        enable_caching=True,
        cache_root=wanted["cache_root"],
    )
    module, _, name = wanted["pipeline"].partition(":")
    pipeline = getattr(importlib.import_module(module), name)
    try:
        pipeline(**wanted["arguments"])
    except RuntimeError as error:
        # kfp says so when a task failed; what was wrong stands further up, in the step's own lines.
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
