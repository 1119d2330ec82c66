"""What a job could not run with is refused before anything is submitted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.config import build, rename_settings, result_settings
from cappy.errors import ConfigError
from cappy.training.finetuning import FinetuningConfig
from cappy.training.pretraining import PretrainingConfig

Plan = Callable[..., FinetuningConfig]
OWN = {"project": "p", "bucket": "gs://b"}
VERTEX = {"launcher": "customjob", "image": "registry.example/cappy@sha256:0", "customjob": OWN}


def test_where_a_step_trains_does_not_name_the_work(plan: Plan) -> None:
    own = {"namespace": "n", "accelerator": "gpu"}
    elsewhere = plan(launcher="trainjob", image="i", max_restarts=1, timeout_hours=2.0, trainjob=own)
    assert result_settings(elsewhere) == result_settings(plan())
    other = {**OWN, "spot": True, "machine": "a2", "region": "europe-west4"}
    assert result_settings(plan(**{**VERTEX, "customjob": other})) == result_settings(plan())


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"launcher": "trainjob", "work": "work"}, ("--work work", "relative path", "an absolute path on a volume")),
        ({"launcher": "trainjob", "scorer": "out/scorer"}, ("--scorer out/scorer", "relative path")),
        ({"launcher": "trainjob", "trainjob": {"volume": "claim"}}, ("--trainjob.volume claim", "CLAIM:/path")),
        (
            {"launcher": "trainjob", "trainjob": {"volume": "claim:/elsewhere"}},
            ("--work", "on the volume", "/elsewhere"),
        ),
        ({"launcher": "trainjob", "customjob": {"spot": True}}, ("--customjob.spot", "--launcher customjob")),
        ({"launcher": "here", "trainjob": {"cpu": "8"}}, ("--trainjob.cpu", "--launcher trainjob")),
        ({"launcher": "trainjob", "trainjob": {"cpus": "8"}}, ("--trainjob.cpus", "trainjob.cpu")),
        ({"launcher": "trainjob", "dry_run": True}, ("--dry-run", "--launcher here")),
        (
            {"launcher": "trainjob", "parallelism": "jax", "nodes": 2},
            ("--parallelism jax", "2 were requested", "--nodes 1"),
        ),
        ({**VERTEX, "image": ""}, ("--image", "--customjob.project", "--customjob.bucket gs://")),
        ({**VERTEX, "customjob": {**OWN, "bucket": "s3://b"}}, ("--image", "--customjob.bucket gs://")),
        (
            {**VERTEX, "customjob": {**OWN, "volume": "10.0.0.2:/export:/mnt/work"}},
            ("--customjob.volume 10.0.0.2:/export:/mnt/work", "only under /mnt/nfs"),
        ),
        ({**VERTEX, "trainjob": {"cpu": "8"}}, ("--trainjob.cpu", "--launcher trainjob")),
        ({**VERTEX, "devices": 4}, ("4 devices", "--customjob.accelerator", "--devices 1")),
        ({"launcher": "slurm"}, ("--launcher", "'trainjob' or 'customjob'", "'slurm'")),
        ({"launcher": "trainjob", "max_restarts": -1}, ("--max-restarts", "-1")),
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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("strategy", "--parallelism"),
        ("retries", "--max-restarts"),
        ("accelerator", "--trainjob.accelerator or --customjob.accelerator"),
        ("runtime", "--trainjob.runtime"),
        ("project", "--customjob.project"),
    ],
)
def test_a_setting_of_an_earlier_release_is_refused_with_its_name_now(old: str, new: str, plan: Plan) -> None:
    with raises_naming(ConfigError, "finetuning", f"--{old} ", new):
        plan(**{old: "1"})


def test_settings_in_a_manifest_of_an_earlier_release_get_their_names_now() -> None:
    assert rename_settings(FinetuningConfig, {"strategy": "jax", "epochs": 2.0}) == {
        "parallelism": "jax",
        "epochs": 2.0,
    }
