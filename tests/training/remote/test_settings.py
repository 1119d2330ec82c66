"""What a job could not run with is refused before anything is submitted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    ("changed", "words"),
    [
        (
            {"launcher": "trainjob", "work": "work"},
            "--work work: is a relative path; give an absolute path on a volume",
        ),
        ({"launcher": "trainjob", "scorer": "out/scorer"}, "--scorer out/scorer: is a relative path"),
        ({"launcher": "trainjob", "volume": "claim"}, "--volume claim: is no CLAIM:/path"),
        ({"launcher": "trainjob", "volume": "claim:/elsewhere"}, "does not lie on the volume, under /elsewhere"),
        ({"launcher": "trainjob", "spot": True}, "--spot is for customjob"),
        ({"launcher": "trainjob", "dry_run": True}, "a dry run has nothing to follow"),
        ({"launcher": "trainjob", "strategy": "jax", "nodes": 2}, "jax drives one machine, and 2 were asked for"),
        ({**VERTEX, "image": ""}, "needs --image, --project and --bucket gs://"),
        ({**VERTEX, "bucket": "s3://b"}, "needs --image, --project and --bucket gs://"),
        ({**VERTEX, "volume": "10.0.0.2:/export:/mnt/work"}, "Vertex AI mounts under /mnt/nfs alone"),
        ({**VERTEX, "cpu": "8"}, "--cpu and --memory are for trainjob; --machine has both"),
        ({**VERTEX, "devices": 4}, "4 devices and no accelerator; give --accelerator"),
        ({"launcher": "slurm"}, "--launcher: Input should be 'here', 'trainjob' or 'customjob', got 'slurm'"),
        ({"launcher": "trainjob", "retries": -1}, "--retries"),
        ({"launcher": "trainjob", "timeout_hours": 0}, "--timeout-hours"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changed: dict[str, Any], words: str, plan: Plan) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**changed)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_is_looked_at_as_a_scorer_is(source: Path, tmp_path: Path) -> None:
    given = {"source": source, "target": "t", "work": tmp_path, "launcher": "trainjob"}
    assert build(PretrainingConfig, {**given, "encoder": f"hub:a/b@{'0' * 40}"}).launcher == "trainjob"
    with pytest.raises(ConfigError, match=r"--encoder out/encoder: is a relative path"):
        build(PretrainingConfig, {**given, "encoder": "out/encoder"})
