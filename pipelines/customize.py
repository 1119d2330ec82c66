"""Sets a task's image, resources, secrets, volumes and retries; refuses what the platform does not support."""

import json
import re
from collections.abc import Callable
from typing import Any

from cappy.errors import ConfigError
from cappy.runs import ACCELERATORS_VARIABLE, RUN_VARIABLE
from cappy.steps import STEP_SPECS, TRAINING_STEPS
from components import TRAINER_CUDA_IMAGE, TRAINER_IMAGE, TRAINER_TPU_IMAGE, WORKER_CUDA_IMAGE, WORKER_IMAGE
from pipelines.definitions import TRACKING_TASK
from pipelines.recipe import (
    ACCELERATED_STEPS,
    VERTEX_TYPES,
    Platform,
    Recipe,
    Resources,
    kubernetes_resource,
    refuse_password,
)

BACKOFF = {"backoff_duration": "30s", "backoff_factor": 2.0}
"""Pauses between attempts: it takes minutes to replace a lost node."""
MAX_PAUSE_SECONDS = 600
"""Longest pause between attempts on Vertex AI, whose `backoff_max_duration` limits the pause."""
MIN_RETRY_SECONDS = 30 * 24 * 3600
"""On Kubeflow `backoff_max_duration` limits all attempts together, from the start of the first one: Argo starts none
after that, and ends one that still runs (argo-workflows, workflow/controller/operator.go)."""
GRACE_SECONDS = 120
"""Time that a pod gets beyond `hours`, in which the step ends by itself."""
FOLLOWER_RESOURCES = ("1", "2Gi")
"""Cores and memory of a step that submits a job and follows it."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (in the pod)
RUN_LABEL_PATH = "metadata.labels['pipeline/runid']"
"""Where a pod has the id of its run: Kubeflow Pipelines labels every pod with it."""
SECRET_VERSION = re.compile(r"projects/[^/]+/secrets/[^/]+/versions/[^/]+")

TaskCustomizer = Callable[[str, Any], None]
"""Called with a step's name and its kfp task while the pipeline is built."""


def customizer_for(platform: Platform, recipe: Recipe) -> TaskCustomizer:
    """The function that customizes each task for a platform; raises ConfigError for an unsupported resource."""
    if platform == "kubeflow":
        return _for_kubeflow(recipe)
    if platform == "vertex":
        return _for_vertex(recipe)
    return _for_docker(recipe) if platform == "docker" else customize_nothing


def customize_nothing(step: str, task: Any) -> None:
    """Leaves the task as it is, for runs in processes of this machine."""


def _for_docker(recipe: Recipe) -> TaskCustomizer:
    """Sets the recipe's images. Cores and memory are not limited.

    API keys are not set here, because the task's YAML is stored: `pipelines.execution` passes them to the engine.
    """

    def customize(step: str, task: Any) -> None:
        task.set_container_image(image(recipe, step))

    return customize


def _for_kubeflow(recipe: Recipe) -> TaskCustomizer:
    """The customizer for Kubeflow; raises ConfigError if the recipe requests something that a pod cannot have."""
    for step in (*recipe.steps, TRACKING_TASK):
        _refuse_on_kubeflow(recipe, step)

    def customize(step: str, task: Any) -> None:
        from kfp import kubernetes

        resources, kubeflow = recipe.resources_of(step), recipe.kubeflow
        environment = {"HF_HOME": f"{kubeflow.mount}/hub"}
        _customize_common(recipe, step, task, environment, max_backoff=_all_attempts_seconds(resources))
        kubernetes.mount_pvc(task, pvc_name=kubeflow.volume, mount_path=kubeflow.mount)
        # Data loader workers and ranks exchange tensors there; the default of a pod is 64 MiB.
        shared = {"mount_path": SHARED_MEMORY, "medium": "Memory", "size_limit": kubeflow.shared_memory}
        kubernetes.empty_dir_mount(task, volume_name="shared-memory", **shared)
        if kubeflow.pull_secret:
            kubernetes.set_image_pull_secrets(task, [kubeflow.pull_secret])
        kubernetes.use_field_path_as_env(task, RUN_VARIABLE, RUN_LABEL_PATH)
        kubernetes.set_timeout(task, _attempt_seconds(resources))
        for secret in resources.secrets:
            kubernetes.use_secret_as_env(task, secret.name, {secret.key: secret.variable})
        if resources.nodes > 1:
            return  # The step only follows a job, and the job has the accelerators.
        if resources.accelerator != "none":
            task.set_accelerator_type(kubernetes_resource(resources.accelerator)).set_accelerator_limit(resources.count)
        labels = {**kubeflow.accelerator_labels.get(resources.accelerator, {}), **resources.node_selector}
        for label, value in labels.items():
            kubernetes.add_node_selector(task, label, value)
        for taint in resources.tolerations:
            operator = "Equal" if taint.value else "Exists"
            kubernetes.add_toleration(
                task, key=taint.key, operator=operator, value=taint.value or None, effect=taint.effect
            )
        if resources.spot:
            for label, value in kubeflow.spot.items():
                kubernetes.add_node_selector(task, label, value)
                kubernetes.add_toleration(task, key=label, operator="Equal", value=value, effect="NoSchedule")

    return customize


def _attempt_seconds(resources: Resources) -> int:
    """Time limit of one attempt on Kubeflow."""
    return int(resources.hours * 3600) + GRACE_SECONDS


def _all_attempts_seconds(resources: Resources) -> int:
    """Time limit of all attempts on Kubeflow together: each may use its own."""
    attempts = resources.retries + 1
    return max(MIN_RETRY_SECONDS, attempts * (_attempt_seconds(resources) + MAX_PAUSE_SECONDS))


def _refuse_on_kubeflow(recipe: Recipe, step: str) -> None:
    _refuse_on_any_cluster(recipe, step)
    resources = recipe.resources_of(step)
    if resources.nodes > 1:
        for name in ("spot", "node_selector", "tolerations", "secrets"):
            if getattr(resources, name):
                remedy = f"put it into the TrainingRuntime {recipe.kubeflow.runtime} (deploy/base/training)"
                raise ConfigError(f"resources.{step}.{name}: cannot be set by a TrainJob; {remedy}")
    if resources.accelerator.startswith("tpu-") and not resources.node_selector:
        remedy = "give node_selector with cloud.google.com/gke-tpu-accelerator and gke-tpu-topology"
        raise ConfigError(
            f"resources.{step}.accelerator: {resources.accelerator} is selected by node labels on Kubernetes; {remedy}"
        )
    if resources.machine_type:
        remedy = "give cpu and memory, or a node_selector"
        raise ConfigError(f"resources.{step}.machine_type: Kubernetes has no machine types; {remedy}")
    for secret in resources.secrets:
        if not secret.key or "/" in secret.name:
            remedy = "give the name of a Secret and the key of its entry"
            raise ConfigError(
                f"resources.{step}.secrets: {secret.variable} must come from a Secret of the namespace; {remedy}"
            )


def _for_vertex(recipe: Recipe) -> TaskCustomizer:
    """The customizer for Vertex AI; raises ConfigError if the recipe requests something unsupported."""
    for step in (*recipe.steps, TRACKING_TASK):
        _refuse_on_vertex(recipe, step)

    def customize(step: str, task: Any) -> None:
        resources = recipe.resources_of(step)
        secrets = {"CAPPY_SECRETS": _secrets_as_text(resources)} if resources.secrets else {}
        environment = {"HF_HOME": "/tmp/hub", **secrets}  # noqa: S108 (in the step's container)
        _customize_common(recipe, step, task, environment, max_backoff=MAX_PAUSE_SECONDS)
        if resources.accelerator != "none" and resources.nodes == 1:
            task.set_accelerator_type(VERTEX_TYPES[resources.accelerator]).set_accelerator_limit(resources.count)

    return customize


def _refuse_on_vertex(recipe: Recipe, step: str) -> None:
    resources = recipe.resources_of(step)
    where = f"resources.{step}"
    if resources.accelerator.startswith("tpu-"):
        remedy = "train on GPUs, or submit the job yourself: cappy STEP --launcher customjob --parallelism jax"
        raise ConfigError(
            f"{where}.accelerator: Vertex AI has no {resources.accelerator} for the steps of a pipeline; {remedy}"
        )
    _refuse_on_any_cluster(recipe, step)
    if resources.nodes == 1 and resources.spot:
        remedy = "leave it out, or train as a CustomJob (nodes: 2 or more)"
        raise ConfigError(f"{where}.spot: Vertex AI has no spot machines for the steps of a pipeline; {remedy}")
    if resources.nodes > 1 and not resources.machine_type:
        raise ConfigError(f"{where}.machine_type: a CustomJob needs one; give for example a3-highgpu-8g")
    if resources.nodes == 1 and resources.machine_type:
        remedy = "give cpu, memory and accelerator, or train as a CustomJob (nodes: 2 or more)"
        raise ConfigError(f"{where}.machine_type: cannot be chosen for a pipeline step on Vertex AI; {remedy}")
    if resources.node_selector or resources.tolerations:
        remedy = "leave them out; cpu, memory and accelerator choose the machine"
        raise ConfigError(f"{where}: node_selector and tolerations are only for Kubernetes; {remedy}")
    for secret in resources.secrets:
        if not SECRET_VERSION.fullmatch(secret.name):
            remedy = "name it projects/P/secrets/S/versions/V"
            raise ConfigError(
                f"{where}.secrets: {secret.variable} must come from Secret Manager on Vertex AI; {remedy}"
            )


def _customize_common(recipe: Recipe, step: str, task: Any, environment: dict[str, str], *, max_backoff: int) -> None:
    """Sets what Kubeflow and Vertex AI both need: image, cores, memory, retries, environment variables.

    `max_backoff` is the platform's `backoff_max_duration` in seconds.
    """
    resources = recipe.resources_of(step)
    task.set_container_image(image(recipe, step))
    # With several nodes the step only follows a job, and the recipe's resources are those of each node of the job.
    cpu, memory = (resources.cpu, resources.memory) if resources.nodes == 1 else FOLLOWER_RESOURCES
    if cpu:
        task.set_cpu_request(cpu).set_cpu_limit(cpu)
    if memory:
        task.set_memory_request(memory).set_memory_limit(memory)
    if resources.retries and step != TRACKING_TASK:
        task.set_retry(num_retries=resources.retries, **BACKOFF, backoff_max_duration=f"{max_backoff}s")
    limit = {"CAPPY_TIMEOUT": f"{resources.hours * 3600:.0f}"}
    has_accelerator = resources.accelerator != "none" and resources.nodes == 1
    given = {ACCELERATORS_VARIABLE: f"{resources.accelerator}:{resources.count}"} if has_accelerator else {}
    refuse_password("tracking_uri", recipe.tracking_uri)
    address = {"MLFLOW_TRACKING_URI": recipe.tracking_uri} if recipe.tracking_uri else {}
    for name, value in {**limit, **given, **address, **environment}.items():
        task.set_env_variable(name, value)


def _refuse_on_any_cluster(recipe: Recipe, step: str) -> None:
    """Raises ConfigError for what no cluster supports: nodes or accelerators that a step does not use."""
    resources = recipe.resources_of(step)
    where = f"resources.{step if step in recipe.resources else 'default'}"
    if resources.accelerator != "none" and step not in ACCELERATED_STEPS:
        raise ConfigError(f"{where}.accelerator: {step} runs no model; leave it out")
    if resources.count > 1 and step not in TRAINING_STEPS:
        remedy = "use shards to run it in parallel" if STEP_SPECS[step].sharded else "give count: 1"
        raise ConfigError(f"{where}.count: {resources.count}: {step} uses one accelerator; {remedy}")
    if resources.nodes > 1 and step not in TRAINING_STEPS:
        remedy = "use shards to run it in parallel"
        raise ConfigError(f"{where}.nodes: {resources.nodes}: only training can use several nodes; {remedy}")
    if not resources.accelerator.startswith("tpu-"):
        return
    if step not in TRAINING_STEPS or recipe.settings.get(step, {}).get("parallelism") != "jax":
        remedy = f"give settings.{step}.parallelism: jax" if step in TRAINING_STEPS else "use a GPU or none"
        raise ConfigError(f"{where}.accelerator: only training with JAX runs on a {resources.accelerator}; {remedy}")
    if resources.nodes > 1:
        raise ConfigError(f"{where}.nodes: {resources.nodes}: training with JAX uses one machine; give nodes: 1")


def image(recipe: Recipe, step: str) -> str:
    """The image of a step: its own, otherwise the recipe's for its kind, otherwise the default of this version.

    A step with a GPU gets an image with CUDA. If the recipe names only an image without that word, it is for all steps.
    """
    resources, images = recipe.resources_of(step), recipe.images
    if resources.image:
        return resources.image
    if step in TRAINING_STEPS and resources.accelerator.startswith("tpu-"):
        return images.get("trainer-tpu") or TRAINER_TPU_IMAGE
    has_gpu = resources.accelerator.startswith("nvidia-")
    if step in TRAINING_STEPS:
        given, default = images.get("trainer"), TRAINER_CUDA_IMAGE if has_gpu else TRAINER_IMAGE
        return (images.get("trainer-cuda") if has_gpu else "") or given or default
    given, default = images.get("worker"), WORKER_CUDA_IMAGE if has_gpu else WORKER_IMAGE
    return (images.get("worker-cuda") if has_gpu else "") or given or default


def unpinned_images(recipe: Recipe) -> list[str]:
    """The images of a recipe that are not pinned by a digest."""
    return sorted({name for step in recipe.steps if "@" not in (name := image(recipe, step))})


def _secrets_as_text(resources: Resources) -> str:
    """JSON of variable -> secret name, for a step that reads the secrets itself; it holds no values."""
    return json.dumps({secret.variable: secret.name for secret in resources.secrets})
