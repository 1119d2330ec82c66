"""Pipelines compile where nothing but kfp is installed, and quickly."""

import subprocess
import sys

import pytest
import yaml

from pipelines import PIPELINES, STEPS
from pipelines.compile import compiled

BLOCKED = ["torch", "transformers", "mlflow", "deepspeed", "google.cloud.aiplatform", "pyarrow", "cappy"]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_compiles_with_everything_heavy_blocked(name: str) -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        f"from pipelines.compile import compiled\nimport time\n"
        f"print(len(compiled({name!r})), time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    length, seconds = done.stdout.split()
    assert int(length) > 10_000
    assert float(seconds) < 2


@pytest.mark.parametrize("name", PIPELINES)
def test_the_yaml_has_every_step_and_the_exit_step_in_one_document(name: str) -> None:
    (document,) = yaml.safe_load_all(compiled(name))
    components = {key.removeprefix("comp-") for key in document["components"]}
    assert {*STEPS[name], "tracking"} <= components
    assert document["sdkVersion"] == "kfp-2.17.0"


def test_what_writes_to_the_registry_is_never_answered_from_a_cache() -> None:
    document = yaml.safe_load(compiled("adapt"))
    cached = {}
    for component in (document["root"], *document["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            cached[task["componentRef"]["name"].removeprefix("comp-")] = task.get("cachingOptions", {}).get(
                "enableCache", False
            )
    never = {"registration", "promotion", "deployment", "tracking"}
    assert {step for step in (*STEPS["adapt"], "tracking") if not cached[step]} == never


def test_the_run_id_is_no_parameter_so_that_a_second_run_can_hit_the_cache() -> None:
    assert "{{$.pipeline_job_uuid}}" in compiled("adapt")
    assert "run" not in yaml.safe_load(compiled("adapt"))["root"]["inputDefinitions"]["parameters"]
