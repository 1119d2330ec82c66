"""The README's code blocks run, in order, in one empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import PAGES, RUNS, blocks


@pytest.mark.pulse
@pytest.mark.timeout(600)
def test_every_block_runs(tmp_path: Path) -> None:
    """But for those that say why not (`tests/test_docs.py` holds that they do)."""
    running = [block for block in blocks(PAGES[0]) if not block.reason]
    assert len(running) >= 4
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in running:
        command = [*RUNS[block.language], block.code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert list(tmp_path.glob(".cappy/**/report.html")), "adapt leaves a report"
