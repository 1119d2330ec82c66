"""What a job could not run with is refused before anything is submitted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.config import build, identity
from cappy.errors import ConfigError
from cappy.training.finetuning import FinetuningConfig
from cappy.training.pretraining import PretrainingConfig

Plan = Callable[..., FinetuningConfig]
VERTEX = {"launcher": "customjob", "image": "registry.example/cappy@sha256:0", "project": "p", "bucket": "gs://b"}


def test_where_a_step_trains_does_not_name_the_work(plan: Plan) -> None:
    elsewhere = plan(launcher="trainjob", image="i", namespace="n", retries=1, timeout_hours=2.0, accelerator="gpu")
    assert identity(elsewhere) == identity(plan())
    assert identity(plan(**VERTEX, spot=True, machine="a2", region="europe-west4")) == identity(plan())


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"launcher": "trainjob", "work": "work"}, ("--work work", "relative path", "an absolute path on a volume")),
        ({"launcher": "trainjob", "scorer": "out/scorer"}, ("--scorer out/scorer", "relative path")),
        ({"launcher": "trainjob", "volume": "claim"}, ("--volume claim", "CLAIM:/path")),
        ({"launcher": "trainjob", "volume": "claim:/elsewhere"}, ("--work", "on the volume", "/elsewhere")),
        ({"launcher": "trainjob", "spot": True}, ("--spot", "customjob")),
        ({"launcher": "trainjob", "dry_run": True}, ("dry run", "--launcher here")),
        ({"launcher": "trainjob", "strategy": "jax", "nodes": 2}, ("--strategy jax", "2 were asked for", "--nodes 1")),
        ({**VERTEX, "image": ""}, ("--image", "--project", "--bucket gs://")),
        ({**VERTEX, "bucket": "s3://b"}, ("--image", "--project", "--bucket gs://")),
        ({**VERTEX, "volume": "10.0.0.2:/export:/mnt/work"}, ("--volume 10.0.0.2:/export:/mnt/work", "/mnt/nfs alone")),
        ({**VERTEX, "cpu": "8"}, ("--cpu", "--memory", "trainjob", "--machine")),
        ({**VERTEX, "devices": 4}, ("4 devices", "--accelerator", "--devices 1")),
        ({"launcher": "slurm"}, ("--launcher", "'trainjob' or 'customjob'", "'slurm'")),
        ({"launcher": "trainjob", "retries": -1}, ("--retries", "-1")),
        ({"launcher": "trainjob", "timeout_hours": 0}, ("--timeout-hours", "0")),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changed: dict[str, Any], names: tuple[str, ...], plan: Plan) -> None:
    with raises_naming(ConfigError, *names) as caught:
        plan(**changed)
    assert "\n" not in str(caught.value)


def test_an_encoder_is_looked_at_as_a_scorer_is(source: Path, tmp_path: Path) -> None:
    given = {"source": source, "target": "t", "work": tmp_path, "launcher": "trainjob"}
    assert build(PretrainingConfig, {**given, "encoder": f"hub:a/b@{'0' * 40}"}).launcher == "trainjob"
    with raises_naming(ConfigError, "--encoder out/encoder", "relative path"):
        build(PretrainingConfig, {**given, "encoder": "out/encoder"})
