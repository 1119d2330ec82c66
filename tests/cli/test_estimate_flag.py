"""`cappy sampling --estimate` prints what a run would take, and that is all it does."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from chat_server import Model, serving
from wording import assert_names

from cappy.records import Instance, write

Cappy = Callable[..., subprocess.CompletedProcess[str]]
INSTANCES = [Instance(instance_id=str(i), instruction=f"prompt {i}", references=("x",)) for i in range(60)]


def test_the_flag_prints_and_neither_asks_nor_writes(tmp_path: Path, here: Cappy) -> None:
    write(tmp_path / "in", INSTANCES)
    model = Model()
    with serving(model) as url:
        flags = ["sampling", "--source", str(tmp_path / "in"), "--generator", f"openai:m@{url}", "--estimate"]
        flags += ["--work", str(tmp_path / "work"), "--strategy"]
        printed = here(*flags, "endpoint8", "--price-output", "2").stdout
        (values,) = json.loads(here(*flags, "endpoint8", "--json").stdout)
        beams = here(*flags, "beam4")
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert_names(lines["requests"], "480", "180")
    assert lines["cost"].split() == ["cost", "0.49"]  # 480 responses of at most 512 tokens
    assert values["requests"] == 480
    assert beams.returncode == 1
    assert_names(beams.stderr, "beam4", "endpoint")
    assert model.asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_without_an_llm_there_is_nothing_to_estimate(tmp_path: Path, here: Cappy) -> None:
    write(tmp_path / "in", INSTANCES)
    alone = here("sampling", "--source", str(tmp_path / "in"), "--estimate")
    assert alone.returncode == 1
    assert_names(alone.stderr, "--estimate", "--generator")
