"""What `kubectl apply -k` would send: the overlays of deploy/, put together by kustomize itself."""

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAYS = tuple(sorted(folder.name for folder in (DEPLOY / "overlays").iterdir()))
WITHOUT_KUSTOMIZE = "no kustomize 5 here; install kubectl 1.27 or later, or kustomize"
Object = dict[str, Any]


class Pod(NamedTuple):
    """A pod's spec and labels, at any depth of an object."""

    owner: str
    spec: Object
    labels: dict[str, str]


@functools.cache
def _program() -> tuple[str, ...] | None:
    """`kubectl kustomize` or `kustomize build`, of a version that knows what the overlays use."""
    for command, asked in ((("kustomize", "build"), ["version"]), (("kubectl", "kustomize"), ["version", "--client"])):
        if shutil.which(command[0]) is None:
            continue
        output = subprocess.run([command[0], *asked], capture_output=True, text=True).stdout
        result = re.search(r"(?:Kustomize Version: |^)v(\d+)\.", output, re.MULTILINE)
        if result and int(result[1]) >= 5:
            return command
    return None


@functools.cache
def _text(folder: Path) -> str:
    program = _program()
    if program is None:
        pytest.skip(WITHOUT_KUSTOMIZE)
    done = subprocess.run([*program, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # A field that a newer kustomize no longer takes is only warned of.
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


def rendered(overlay: str) -> list[Object]:
    """The objects of an overlay; skips without kustomize."""
    return list(yaml.safe_load_all(_text(DEPLOY / "overlays" / overlay)))


def with_component(overlay: str, component: str, folder: Path) -> list[Object]:
    """The objects of an overlay with the line that its guide names: `components: [../../components/NAME]`."""
    deploy = folder / "deploy"
    shutil.copytree(DEPLOY, deploy, dirs_exist_ok=True)
    with (deploy / "overlays" / overlay / "kustomization.yaml").open("a") as file:
        file.write(f"components: [../../components/{component}]\n")
    return list(yaml.safe_load_all(_text(deploy / "overlays" / overlay)))


def namespace() -> Object:
    """The Namespace, which is applied on its own."""
    return dict(yaml.safe_load(_text(DEPLOY / "base" / "namespace")))


def only(objects: list[Object], kind: str, name: str = "") -> Object:
    """The one object of a kind (and a name)."""
    result = [one for one in objects if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    assert len(result) == 1, f"{kind} {name}: {len(result)} of them"
    return result[0]


def pods(objects: list[Object]) -> Iterator[Pod]:
    """Every pod that the objects would start."""
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            template = one["spec"]["template"]
            yield Pod(one["kind"], template["spec"], template["metadata"]["labels"])
        elif one["kind"] in ("TrainingRuntime", "ClusterTrainingRuntime"):
            for job in one["spec"]["template"]["spec"]["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                yield Pod(one["kind"], template["spec"], template["metadata"]["labels"])
        elif one["kind"] == "InferenceService":
            yield Pod(one["kind"], one["spec"]["predictor"], one["metadata"]["labels"])
        else:
            assert "containers" not in str(one.get("spec")), f"{one['kind']} starts pods that no test looks at"


def containers(objects: list[Object]) -> Iterator[tuple[Pod, Object]]:
    """Every container with its pod."""
    for pod in pods(objects):
        for container in (*pod.spec.get("initContainers", ()), *pod.spec["containers"]):
            yield pod, container


def variables(container: Object) -> dict[str, Any]:
    """Environment of a container: name -> value, or where it comes from."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container.get("env", ())}


def flags(container: Object) -> dict[str, str]:
    """Arguments of a container that are pairs of a flag and its value."""
    args = container["args"]
    return dict(zip(args[::2], args[1::2], strict=True))


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector without expressions selects something with these labels."""
    assert set(selector) <= {"matchLabels"}
    return set(selector.get("matchLabels", {}).items()) <= set(labels.items())


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number of cores, bytes or devices."""
    result = re.fullmatch(r"([0-9.]+)(m|Mi|Gi|Ti|)", str(text))
    assert result, text
    return float(result[1]) * {"m": 1e-3, "": 1.0, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}[result[2]]
