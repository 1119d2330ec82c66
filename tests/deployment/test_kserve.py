"""The InferenceService: what runs, how much of the traffic it gets, what it may do."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from vertex_scenario import IMAGE, version
from wording import raises_naming

from cappy.config import build
from cappy.deployment.kserve import inference_service, to_yaml
from cappy.deployment.step import DeploymentConfig
from cappy.errors import ConfigError


def service(**changed: Any) -> dict[str, Any]:
    places = {"version": "version", "report": "report", "target": "target", "platform": "kserve", "image": IMAGE}
    settings = {"tracking_uri": "http://mlflow.mlops:5000", **changed}
    return inference_service(build(DeploymentConfig, {**places, **settings}), version(3))


def container(**changed: Any) -> dict[str, Any]:
    result: dict[str, Any] = service(**changed)["spec"]["predictor"]["containers"][0]
    return result


def test_the_version_runs_by_number_in_the_image_with_that_digest() -> None:
    result = container()
    assert result["image"] == IMAGE
    assert result["args"][:2] == ["--scorer", "models:/cappy/3"]
    assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow.mlops:5000"} in result["env"]
    assert service()["metadata"]["annotations"]["cappy/manifest"] == "3" * 64


def test_a_canary_gets_its_share_and_a_whole_version_no_entry() -> None:
    assert service(traffic=10)["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert "canaryTrafficPercent" not in service()["spec"]["predictor"]


def test_a_copied_scorer_is_read_where_kserve_mounts_it_and_mlflow_is_not_asked() -> None:
    result = container(kserve={"storage": "gs://bucket/scorer"}, tracking_uri="")
    assert result["args"][1] == "/mnt/models"
    names = {one["name"]: one["value"] for one in result["env"]}
    assert names["STORAGE_URI"] == "gs://bucket/scorer"
    assert "MLFLOW_TRACKING_URI" not in names


def test_no_password_is_written_down_and_a_secret_can_bring_it() -> None:
    written = to_yaml(
        service(tracking_uri="https://anna:secret@mlflow.example/path", kserve={"secret": "mlflow-login"})
    )
    assert "secret@" not in written
    assert "anna" not in written
    assert "https://mlflow.example/path" in written
    assert {"secretRef": {"name": "mlflow-login"}} in yaml.safe_load(written)["spec"]["predictor"]["containers"][0][
        "envFrom"
    ]


@pytest.mark.parametrize("address", ["https://anna:se@cr/et@mlflow.example/path", "https://anna:se?cr@et@h/path"])
def test_an_address_whose_host_is_not_clear_is_refused_without_its_password(address: str) -> None:
    with raises_naming(ConfigError, "--tracking-uri", "percent-encode", "--kserve.secret") as error:
        service(tracking_uri=address)
    assert "cr" not in str(error.value).replace("--kserve.secret", "").replace("percent-encode", "")


def test_a_registry_on_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with raises_naming(ConfigError, "--tracking-uri", "sqlite:", "--kserve.storage"):
        service(tracking_uri="")


def test_the_container_may_do_nothing_that_it_need_not() -> None:
    rights = container()["securityContext"]
    assert rights["runAsNonRoot"] is True
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}


def test_all_that_the_service_writes_has_a_place_to_go() -> None:
    result = container()
    places = [result["workingDir"], *(one["value"] for one in result["env"] if one["name"] in ("HOME", "TMPDIR"))]
    mounted = {mount["mountPath"]: mount["name"] for mount in result["volumeMounts"]}
    assert len(places) == 3
    assert set(places) <= set(mounted)
    assert set(mounted.values()) == {volume["name"] for volume in service()["spec"]["predictor"]["volumes"]}


def test_the_service_has_ended_before_a_cluster_would_kill_it() -> None:
    """30 seconds after SIGTERM where the manifest does not say, and Knative lets none say."""
    actual = container()["args"]
    seconds = [int(actual[actual.index(flag) + 1]) for flag in ("--notice", "--grace")]
    assert sum(seconds) <= 25
    assert "terminationGracePeriodSeconds" not in service()["spec"]["predictor"]


def test_the_cluster_tells_the_pod_nothing_and_gives_it_no_token() -> None:
    predictor = service()["spec"]["predictor"]
    assert predictor["automountServiceAccountToken"] is False
    assert predictor["enableServiceLinks"] is False


def test_a_gpu_is_asked_for_as_kubernetes_does() -> None:
    assert container(kserve={"gpus": 1})["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in container()["resources"]["limits"]


@pytest.mark.parametrize(
    "changed",
    [
        {"image": "cappy:1"},
        {"kserve": {"storage": "bucket/scorer"}},
        {"kserve": {"storage": "https://anna:secret@host/x"}},
        {"kserve": {"namespace": "My_Space"}},
    ],
)
def test_settings_that_cannot_work_are_refused(changed: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        service(**changed)
