"""The whole pipeline with an LLM behind an endpoint: its key reaches every request and stands nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import Model, serving

CANARY = "sk-canary-of-the-pipeline-0123456789"


@pytest.mark.timeout(300)
def test_a_run_with_an_endpoint_leaves_no_key_behind(tmp_path: Path) -> None:
    rows = [f'{{"instruction": "Say word {i}.", "references": ["SAY WORD {i}. once"]}}' for i in range(60)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(rows) + "\n")
    key = tmp_path.parent / "mounted-key"
    key.write_text(CANARY + "\n")
    model = Model()
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    with serving(model) as url:
        arguments = ["--instances", "tasks.jsonl", "--generator", f"openai:m@{url}", "--strategy", "endpoint8"]
        settings = ["finetuning.epochs=0.1", "evaluation.resamples=200", "sampling.price_output=2.0"]
        flags = [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run(
            [sys.executable, "-c", "from cappy.cli import main; main()", "adapt", *arguments, *flags],
            cwd=tmp_path,
            env={**environment, "OPENAI_API_KEY_FILE": str(key)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert model.keys == {CANARY}
    assert sum(model.answered.values()) == 60 * 8
    assert CANARY not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    # The registry's database, every run's log, each answer on disk.
    assert [path for path in files if path.suffix == ".db"]
    assert len(files) > 200
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
