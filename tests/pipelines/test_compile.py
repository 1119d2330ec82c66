"""Pipelines compile where nothing but kfp is installed, and quickly."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from wording import raises_naming

from cappy.errors import ConfigError
from cappy.steps import STEP_SPECS
from pipelines.builder import compile_pipeline as compiled_recipe
from pipelines.definitions import PIPELINES
from pipelines.recipe import VERTEX_TYPES, Platform, check_recipe

BLOCKED = ["torch", "transformers", "mlflow", "deepspeed", "google.cloud.aiplatform", "pyarrow"]
PLATFORMS: tuple[Platform, ...] = ("local", "docker", "kubeflow", "vertex")
GOLDEN = Path(__file__).parent / "golden"
LARGE = {"cpu": "8", "memory": "32Gi", "hours": 2.0, "retries": 3}
NEEDS: dict[str, dict[str, Any]] = {
    "local": {},
    "docker": {"default": {"image": "registry.example/cappy-worker:1"}},
    "kubeflow": {
        "preparation": {
            **LARGE,
            "spot": True,
            "node_selector": {"pool": "gpu"},
            "tolerations": [{"key": "gpu", "value": "yes"}],
            "secrets": [{"variable": "OPENAI_API_KEY", "name": "llm", "key": "api-key"}],
        }
    },
    "vertex": {
        "preparation": {
            **LARGE,
            "secrets": [{"variable": "OPENAI_API_KEY", "name": "projects/p/secrets/llm/versions/3"}],
        }
    },
}


def compiled(name: str, platform: Platform = "local", **more: Any) -> str:
    return _compiled(json.dumps({"pipeline": name, **more}), platform)


@cache
def _compiled(recipe: str, platform: Platform) -> str:
    """Several tests read the same one."""
    return compiled_recipe(check_recipe(json.loads(recipe)), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_pipeline_compiles_with_everything_heavy_blocked(platform: str) -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        "from pipelines.builder import compile_pipeline as compiled\n"
        "from pipelines.recipe import check_recipe\nimport time\n"
        f"recipes = [check_recipe({{'pipeline': name, 'shards': 4}}) for name in {list(PIPELINES)!r}]\n"
        f"texts = [compiled(recipe, {platform!r}) for recipe in recipes]\n"
        f"print(min(map(len, texts)), time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    length, seconds = done.stdout.split()
    assert int(length) > 10_000
    assert float(seconds) < 2 * len(PIPELINES)


def test_components_need_kfp_alone() -> None:
    blocked = [*BLOCKED, "cappy", "pydantic"]
    names = ", ".join(sorted({step for each in PIPELINES.values() for step in each.steps} | {"gathering", "tracking"}))
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\nfrom components import {names}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "platform"), [("adapt", "kubeflow"), ("pretrain", "vertex")])
def test_the_yaml_is_the_one_that_was_looked_at(name: str, platform: Platform) -> None:
    """`CAPPY_GOLDEN=write pytest tests/pipelines/test_compile.py` writes them anew; look at what changed."""
    recipe = {"shards": 2, "kubeflow": {"pull_secret": "registry"}, "resources": NEEDS[platform]}
    text = compiled(name, platform, tracking_uri="https://mlflow.example", **recipe)
    path = GOLDEN / f"{name}-{platform}.yaml"
    if os.environ.get("CAPPY_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", PIPELINES)
def test_platforms_change_neither_what_a_task_reads_nor_what_its_container_runs(name: str) -> None:
    """Of the pipelines and platforms that are not looked at: they are those that are, but for images and resources."""

    def core(platform: Platform) -> tuple[Any, ...]:
        document = next(iter(yaml.safe_load_all(compiled(name, platform, shards=2))))
        containers = {
            step: (each["container"]["command"], each["container"]["args"])
            for step, each in document["deploymentSpec"]["executors"].items()
        }
        wired = {
            step: (task.get("inputs"), task.get("dependentTasks"), task.get("cachingOptions"))
            for step, task in tasks(document).items()
        }
        own = {key: each.get("inputDefinitions") for key, each in document["components"].items()}
        return containers, wired, own, document["root"]["inputDefinitions"]

    local = core("local")
    for platform in PLATFORMS[1:]:
        result = core(platform)
        if platform == "vertex":  # It names a run by the job, not by its number.
            result = json.loads(json.dumps(result).replace("pipeline_job_name", "pipeline_job_uuid"))
            created = result[1]["tracking"][0]["parameters"]["created"]["runtimeValue"]
            created["constant"] = ""  # And its steps belong to a run by their time.
            assert result == json.loads(json.dumps(local))
        else:
            assert result == local, platform


@pytest.mark.parametrize("name", PIPELINES)
def test_the_yaml_has_every_step_and_the_exit_step_in_one_document(name: str) -> None:
    (document,) = yaml.safe_load_all(compiled(name))
    components = {key.removeprefix("comp-") for key in document["components"]}
    assert {*PIPELINES[name].steps, "tracking"} <= components
    assert "gathering" not in components
    assert document["sdkVersion"] == "kfp-2.17.0"


def test_kubeflow_alone_has_a_second_document_which_vertex_would_refuse() -> None:
    counts = {on: len(list(yaml.safe_load_all(compiled("adapt", on)))) for on in PLATFORMS}
    assert counts == {"local": 1, "docker": 1, "kubeflow": 2, "vertex": 1}


def tasks(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for component in (document["root"], *document["components"].values()):
        result |= component.get("dag", {}).get("tasks", {})
    return result


def test_shards_are_one_loop_whose_parts_come_together_in_one_folder() -> None:
    document = yaml.safe_load(compiled("pretrain", shards=64))
    result = tasks(document)
    loop = next(task for task in result.values() if "parameterIterator" in task)
    assert yaml.safe_load(loop["parameterIterator"]["items"]["raw"]) == [f"{index}/64" for index in range(64)]
    for step in ("sampling", "annotation"):
        assert "loop-item" in result[step]["inputs"]["parameters"]["shard"]["componentInputParameter"]
    source = result["pretraining"]["inputs"]["artifacts"]["annotated"]["taskOutputArtifact"]
    assert source["producerTask"] == "gathering"


def executors(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The containers of a YAML, and what their pods get beside."""
    first, *more = yaml.safe_load_all(text)
    pods = more[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if more else {}
    containers = {name: each["container"] for name, each in first["deploymentSpec"]["executors"].items()}
    return containers, pods


def test_a_step_gets_what_its_recipe_says_and_the_others_do_not() -> None:
    containers, pods = executors(compiled("adapt", "kubeflow", resources=NEEDS["kubeflow"]))
    assert containers["exec-preparation"]["resources"]["resourceCpuLimit"] == "8"
    assert "resourceCpuLimit" not in containers["exec-sampling"].get("resources", {})
    pod = pods["exec-preparation"]
    assert pod["nodeSelector"]["labels"] == {"pool": "gpu", "cloud.google.com/gke-spot": "true"}
    assert {taint["key"] for taint in pod["tolerations"]} == {"gpu", "cloud.google.com/gke-spot"}
    (secret,) = pod["secretAsEnv"]
    assert secret["keyToEnv"] == [{"envVar": "OPENAI_API_KEY", "secretKey": "api-key"}]
    assert int(pod["activeDeadlineSeconds"]) > 2 * 3600
    assert "nodeSelector" not in pods["exec-sampling"]
    for each in pods.values():
        (volume,) = each["pvcMount"]
        assert volume["mountPath"] == "/data"


def environment(container: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


@pytest.mark.parametrize("platform", ["kubeflow", "vertex"])
def test_an_accelerator_is_for_the_steps_that_run_a_model_which_know_of_it(platform: Platform) -> None:
    text = compiled("adapt", platform, resources={"default": {"accelerator": "nvidia-a100-40gb"}})
    containers, pods = executors(text)
    with_gpu = {name for name, each in containers.items() if "accelerator" in each.get("resources", {})}
    assert with_gpu == {"exec-sampling", "exec-finetuning", "exec-evaluation"}
    for name, container in containers.items():
        assert environment(container).get("CAPPY_ACCELERATORS") == ("nvidia-a100-40gb:1" if name in with_gpu else None)
        assert ("-cuda:" in container["image"]) is (name in with_gpu)
        labels = pods.get(name, {}).get("nodeSelector", {}).get("labels", {})
        expected = name in with_gpu and platform == "kubeflow"
        assert (labels == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}) is expected, name


def test_the_labels_of_nodes_with_an_accelerator_can_be_replaced() -> None:
    gpu = {"finetuning": {"accelerator": "nvidia-l4"}}

    def labels(**more: Any) -> dict[str, str]:
        _, pods = executors(compiled("adapt", "kubeflow", **more))
        own_labels: dict[str, str] = pods["exec-finetuning"].get("nodeSelector", {}).get("labels", {})
        return own_labels

    own = {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert labels(resources=gpu, kubeflow={"accelerator_labels": {"nvidia-l4": own}}) == own
    assert labels(resources=gpu, kubeflow={"accelerator_labels": {}}) == {}
    selector = {
        "finetuning": {"accelerator": "nvidia-l4", "node_selector": {"cloud.google.com/gke-accelerator": "mine"}}
    }
    assert labels(resources=selector) == {"cloud.google.com/gke-accelerator": "mine"}


@pytest.mark.parametrize(
    ("named", "training", "sampling"),
    [
        ({}, "cappy-python-trainer-cuda:0.1.0", "cappy-python-worker-cuda:0.1.0"),
        ({"trainer": "t", "worker": "w"}, "t", "w"),
        ({"trainer": "t", "trainer-cuda": "tc", "worker-cuda": "wc"}, "tc", "wc"),
    ],
)
def test_a_step_with_a_gpu_gets_an_image_with_cuda(named: dict[str, str], training: str, sampling: str) -> None:
    needs = {"resources": {"default": {"accelerator": "nvidia-l4"}}, "images": named}
    containers, _ = executors(compiled("adapt", "kubeflow", **needs))
    assert containers["exec-finetuning"]["image"] == training
    assert containers["exec-sampling"]["image"] == sampling
    assert containers["exec-annotation"]["image"] == named.get("worker", "cappy-python-worker:0.1.0")


def test_every_attempt_but_the_exit_steps_is_repeated_and_every_step_has_a_limit() -> None:
    for platform in ("kubeflow", "vertex"):
        document = next(yaml.safe_load_all(compiled("adapt", platform)))
        result = tasks(document)
        steps = [name for name in result if name in PIPELINES["adapt"].steps]
        assert {result[name]["retryPolicy"]["maxRetryCount"] for name in steps} == {2}
        assert "retryPolicy" not in result["tracking"]
        for container in (each["container"] for each in document["deploymentSpec"]["executors"].values()):
            values = {each["name"]: each["value"] for each in container["env"]}
            assert float(values["CAPPY_TIMEOUT"]) == 24 * 3600


@pytest.mark.parametrize(("hours", "retries"), [(0.1, 2), (24.0, 2), (24.0 * 28, 5)])
def test_every_attempt_on_kubeflow_can_use_its_own_hours(hours: float, retries: int) -> None:
    text = compiled("adapt", "kubeflow", resources={"default": {"hours": hours, "retries": retries}})
    _, pods = executors(text)
    policy = tasks(next(yaml.safe_load_all(text)))["sampling"]["retryPolicy"]
    first_to_last = float(policy["backoffMaxDuration"].removesuffix("s"))
    assert first_to_last >= (retries + 1) * int(pods["exec-sampling"]["activeDeadlineSeconds"])
    assert first_to_last >= 30 * 24 * 3600


def cache_keys(text: str, run: Mapping[str, str], arguments: Mapping[str, str]) -> dict[str, str]:
    """Step -> hash of all that Kubeflow Pipelines' cache compares (backend/src/v2/cacheutils/cache.go) and that a
    compiled pipeline decides: image, command, environment, volumes, and parameters with their values.

    The driver puts the values of `run` for placeholders first, and `arguments` for parameters of the pipeline.
    """

    def value(given: Mapping[str, Any]) -> object:
        if "componentInputParameter" in given:
            name = given["componentInputParameter"].removeprefix("pipelinechannel--")
            return arguments.get(name, name)
        constant = json.dumps(given["runtimeValue"]["constant"])
        for placeholder, actual in run.items():
            constant = constant.replace(placeholder, actual)
        return constant

    document, *_ = yaml.safe_load_all(text)
    containers, pods = executors(text)
    keys = {}
    for name, task in tasks(document).items():
        if not task.get("cachingOptions", {}).get("enableCache"):
            continue
        executor = document["components"][task["componentRef"]["name"]].get("executorLabel")
        if executor is None:  # A loop or a condition, whose tasks are counted by themselves.
            continue
        inputs = {key: value(given) for key, given in task["inputs"]["parameters"].items()}
        container = {key: containers[executor].get(key) for key in ("image", "command", "args", "env")}
        volumes = [each["mountPath"] for each in pods.get(executor, {}).get("pvcMount", [])]
        content = json.dumps([inputs, container, volumes], sort_keys=True)
        keys[name] = hashlib.sha256(content.encode()).hexdigest()
    return keys


@pytest.mark.parametrize("platform", ["kubeflow", "vertex"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_later_run_can_reuse_every_cached_step(name: str, platform: Platform) -> None:
    def keys(run: str, fingerprint: str) -> dict[str, str]:
        names = ("uuid", "name", "resource_name", "create_time_utc", "schedule_time_utc")
        values = {f"{{{{$.pipeline_job_{key}}}}}": f"{key} of {run}" for key in names}
        text = compiled(name, platform, shards=2, resources=NEEDS[platform])
        return cache_keys(text, values, {f"{step}_fingerprint": fingerprint for step in STEP_SPECS})

    cached = {step for step in PIPELINES[name].steps_in(2) if STEP_SPECS[step].cached}
    first = keys("first run", "f")
    assert set(first) == cached
    assert keys("second run", "f") == first
    other = keys("first run", "other work")
    assert all(other[step] != first[step] for step in cached)


def test_a_step_on_kubeflow_knows_its_run_by_the_label_of_its_pod() -> None:
    _, pods = executors(compiled("adapt", "kubeflow"))
    assert pods
    for pod in pods.values():
        assert {"name": "CAPPY_RUN", "fieldPath": "metadata.labels['pipeline/runid']"} in pod["fieldPathAsEnv"]


def test_vertex_gets_its_own_names_and_secrets_by_reference() -> None:
    resources = {**NEEDS["vertex"], "sampling": {"accelerator": "nvidia-l4"}}
    containers, _ = executors(compiled("adapt", "vertex", resources=resources))
    assert containers["exec-sampling"]["resources"]["accelerator"]["resourceType"] == "NVIDIA_L4"
    values = {each["name"]: each["value"] for each in containers["exec-preparation"]["env"]}
    assert json.loads(values["CAPPY_SECRETS"]) == {"OPENAI_API_KEY": "projects/p/secrets/llm/versions/3"}


def test_vertexs_names_of_accelerators_are_those_of_its_sdk() -> None:
    types = pytest.importorskip("google.cloud.aiplatform_v1.types")
    assert set(VERTEX_TYPES.values()) <= {each.name for each in types.AcceleratorType}


@pytest.mark.parametrize(
    ("platform", "needs", "names"),
    [
        ("vertex", {"spot": True}, ("sampling.spot", "Vertex AI")),
        ("vertex", {"accelerator": "tpu-v5e"}, ("sampling.accelerator", "Vertex AI", "tpu-v5e", "GPU")),
        ("vertex", {"machine_type": "a2-highgpu-1g"}, ("sampling.machine_type", "give cpu")),
        ("vertex", {"node_selector": {"a": "b"}}, ("resources.sampling", "node_selector", "Kubernetes")),
        ("vertex", {"secrets": [{"variable": "A", "name": "s"}]}, ("A ", "Secret Manager", "projects/P/secrets")),
        ("vertex", {"nodes": 2}, ("resources.sampling.nodes: 2", "training")),
        ("kubeflow", {"nodes": 2}, ("resources.sampling.nodes: 2", "training")),
        ("kubeflow", {"accelerator": "tpu-v6e"}, ("JAX", "tpu-v6e", "GPU")),
        ("kubeflow", {"accelerator": "nvidia-l4", "count": 8}, ("sampling.count: 8", "one accelerator", "shards")),
        ("vertex", {"accelerator": "nvidia-l4", "count": 2}, ("sampling.count: 2", "one accelerator")),
        ("kubeflow", {"machine_type": "a3"}, ("sampling.machine_type", "Kubernetes", "give cpu and memory")),
        ("kubeflow", {"secrets": [{"variable": "A", "name": "s"}]}, ("A ", "Secret of the namespace")),
    ],
)
def test_what_a_platform_lacks_is_refused_before_submission(
    platform: Platform, needs: Any, names: tuple[str, ...]
) -> None:
    with raises_naming(ConfigError, *names):
        compiled("adapt", platform, resources={"sampling": needs})


@pytest.mark.parametrize(
    ("resources", "names"),
    [
        ({"annotation": {"accelerator": "nvidia-l4"}}, ("resources.annotation.accelerator", "runs no model")),
        ({"default": {"accelerator": "nvidia-l4", "count": 4}}, ("resources.default.count: 4", "sampling")),
        ({"evaluation": {"accelerator": "nvidia-l4", "count": 4}}, ("evaluation.count: 4", "give count: 1")),
    ],
)
def test_accelerators_that_a_step_would_not_use_are_refused(resources: dict[str, Any], names: tuple[str, ...]) -> None:
    for platform in ("kubeflow", "vertex"):
        with raises_naming(ConfigError, *names):
            compiled("adapt", platform, resources=resources)


def test_a_tpu_is_for_training_by_jax_on_one_machine_and_has_an_image_of_its_own() -> None:
    needs = {"accelerator": "tpu-v6e", "count": 4, "node_selector": {"cloud.google.com/gke-tpu-topology": "2x2"}}
    by_jax = {"settings": {"finetuning": {"parallelism": "jax"}}}
    result, _ = executors(compiled("adapt", "kubeflow", resources={"finetuning": needs}, **by_jax))
    assert result["exec-finetuning"]["image"] == "cappy-python-trainer-tpu:0.1.0"
    asked = result["exec-finetuning"]["resources"]["accelerator"]
    assert (asked["resourceType"], asked["resourceCount"]) == ("google.com/tpu", "4")
    named = {"images": {"trainer": "mine:gpu", "trainer-tpu": "mine:tpu"}}
    result, _ = executors(compiled("adapt", "kubeflow", resources={"finetuning": needs}, **by_jax, **named))
    assert result["exec-finetuning"]["image"] == "mine:tpu"
    for platform, changed, more, names in (
        ("kubeflow", {}, {}, ("tpu-v6e", "settings.finetuning.parallelism: jax")),
        ("kubeflow", {"nodes": 2}, by_jax, ("finetuning.nodes: 2", "JAX")),
        ("kubeflow", {"node_selector": {}}, by_jax, ("tpu-v6e", "labels", "node_selector")),
        ("vertex", {"nodes": 2, "node_selector": {}}, by_jax, ("Vertex AI", "tpu-v6e")),
    ):
        with raises_naming(ConfigError, *names):
            compiled("adapt", platform, resources={"finetuning": {**needs, **changed}}, **more)  # type: ignore[arg-type]


def test_a_step_whose_job_trains_on_nodes_asks_for_little_itself() -> None:
    needs = {"cpu": "64", "memory": "512Gi", "accelerator": "nvidia-l4", "count": 8, "nodes": 2}
    result, _ = executors(compiled("adapt", "kubeflow", resources={"finetuning": needs}))
    assert result["exec-finetuning"]["resources"]["resourceCpuLimit"] == "1"
    assert result["exec-finetuning"]["resources"]["resourceMemoryLimit"] == "2Gi"
    for name, value in NEEDS["kubeflow"]["preparation"].items():
        if name in ("spot", "node_selector", "tolerations", "secrets"):
            with raises_naming(ConfigError, f"finetuning.{name}: ", "TrainingRuntime cappy-torch"):
                compiled("adapt", "kubeflow", resources={"finetuning": {**needs, name: value}})


@pytest.mark.parametrize("platform", ["kubeflow", "vertex"])
def test_a_password_is_compiled_into_nothing(platform: Platform) -> None:
    with raises_naming(ConfigError, "tracking_uri", "password") as caught:
        compiled("adapt", platform, tracking_uri="https://me:secret@mlflow.example")
    assert "secret@" not in str(caught.value)


def test_what_writes_to_the_registry_is_never_answered_from_a_cache() -> None:
    document = yaml.safe_load(compiled("adapt"))
    cached = {}
    for component in (document["root"], *document["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            cached[task["componentRef"]["name"].removeprefix("comp-")] = task.get("cachingOptions", {}).get(
                "enableCache", False
            )
    never = {"registration", "promotion", "deployment", "tracking"}
    assert {step for step in (*PIPELINES["adapt"].steps, "tracking") if not cached[step]} == never


def test_on_vertex_a_run_is_named_by_what_the_submitter_knows() -> None:
    assert "pipeline_job_uuid" not in compiled("adapt", "vertex")
    assert "{{$.pipeline_job_name}}" in compiled("adapt", "vertex")


def test_the_run_id_is_no_parameter_so_that_a_second_run_can_hit_the_cache() -> None:
    assert "{{$.pipeline_job_uuid}}" in compiled("adapt")
    assert "run" not in yaml.safe_load(compiled("adapt"))["root"]["inputDefinitions"]["parameters"]


def test_the_exit_step_is_held_against_the_platform_too() -> None:
    with pytest.raises(ConfigError, match=r"resources.tracking.accelerator"):
        compiled("adapt", "vertex", resources={"tracking": {"accelerator": "tpu-v5e"}})
