"""MLflow with a password, by the one line that the guide names."""

import re
from pathlib import Path

import pytest
import yaml
from manifests import DEPLOY, Object, only, rendered, with_component

LINE = "components: [../../components/mlflow-login]"


def container(objects: list[Object], name: str) -> Object:
    (result,) = only(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
    return dict(result)


@pytest.mark.parametrize("overlay", ["mlflow-s3", "mlflow-gcs"])
def test_one_line_has_mlflow_ask_for_a_password_that_no_manifest_holds(overlay: str, tmp_path: Path) -> None:
    objects = with_component(overlay, "mlflow-login", tmp_path)
    made, before = container(objects, "mlflow"), container(rendered(overlay), "mlflow")
    assert made["args"] == [*before["args"], "--app-name", "basic-auth"]
    added = {one["name"]: one for one in made["env"] if one not in before["env"]}
    # Without a key of its own each worker would sign sessions that the others refuse.
    for name in ("MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"):
        assert added[name]["valueFrom"]["secretKeyRef"]["name"] == "mlflow-login"
        assert not added[name]["valueFrom"]["secretKeyRef"].get("optional")
    (mount,) = (one for one in made["volumeMounts"] if one["name"] == "login")
    assert added["MLFLOW_AUTH_CONFIG_PATH"]["value"] == f"{mount['mountPath']}/basic_auth.ini"
    (settings,) = (one for one in objects if one["kind"] == "ConfigMap" and "basic_auth.ini" in one["data"])
    lines = settings["data"]["basic_auth.ini"].lower().splitlines()
    assert not [line for line in lines if "password" in line and not line.startswith("#")]


def test_the_service_gives_a_name_of_its_own(tmp_path: Path) -> None:
    made = container(with_component("serving", "serving-login", tmp_path), "cappy-serving")
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in made["env"] if "valueFrom" in one}
    assert secrets["MLFLOW_TRACKING_USERNAME"] == {"name": "mlflow-client", "key": "username"}
    assert secrets["MLFLOW_TRACKING_PASSWORD"] == {"name": "mlflow-client", "key": "password"}


def test_who_deploys_mlflow_reads_that_it_asks_for_no_password_and_the_line_that_changes_that() -> None:
    guide = (DEPLOY.parent / "docs" / "guides" / "kubernetes.md").read_text()
    assert re.search(r"MLflow asks nobody\b.*\bpassword", guide)
    assert LINE in guide
    for overlay in ("mlflow-s3", "mlflow-gcs"):
        text = (DEPLOY / "overlays" / overlay / "kustomization.yaml").read_text()
        assert f"#   {LINE}" in text
        assert "components" not in yaml.safe_load(text)


def test_mlflow_and_its_database_are_reached_by_their_clients_alone() -> None:
    objects = rendered("mlflow-s3")
    database, server = (only(objects, "NetworkPolicy", name)["spec"] for name in ("postgres", "mlflow"))
    component = "app.kubernetes.io/component"
    (allowed,) = database["ingress"]
    assert [one["podSelector"]["matchLabels"][component] for one in allowed["from"]] == ["mlflow"]
    assert all("namespaceSelector" not in one for one in allowed["from"])
    (allowed,) = server["ingress"]
    pods, namespaces = allowed["from"]
    assert pods["podSelector"]["matchLabels"][component] == "serving"
    assert namespaces["namespaceSelector"]["matchLabels"] == {"cappy/mlflow-client": "true"}
    assert [one["port"] for one in allowed["ports"]] == [5000]
    for policy in (database, server):
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
