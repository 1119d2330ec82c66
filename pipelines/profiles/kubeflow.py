"""Kubeflow: volumes, secrets, node selectors and tolerations through kfp-kubernetes, which adds a second document."""

from typing import Any

from cappy.errors import ConfigError
from pipelines.dressing import Dress
from pipelines.profiles import dress_common, refuse_anywhere
from pipelines.recipe import Recipe
from pipelines.resources import kubernetes_resource

SHARED_MEMORY = "/dev/shm"  # noqa: S108 (of the pod)


def dress(recipe: Recipe) -> Dress:
    """The tasks of a recipe for Kubeflow; ConfigError where it asks for what a pod cannot have."""
    for step in (*recipe.steps, "tracking"):
        _refuse(recipe, step)

    def dressed(step: str, task: Any) -> None:
        from kfp import kubernetes

        needs = dress_common(recipe, step, task, {"HF_HOME": f"{recipe.kubeflow.mount}/hub"})
        own = recipe.kubeflow
        kubernetes.mount_pvc(task, pvc_name=own.volume, mount_path=own.mount)
        # Workers of a data loader and ranks exchange tensors there; a pod has 64 MiB of it otherwise.
        shared = {"mount_path": SHARED_MEMORY, "medium": "Memory", "size_limit": own.shared_memory}
        kubernetes.empty_dir_mount(task, volume_name="shared-memory", **shared)
        if own.pull_secret:
            kubernetes.set_image_pull_secrets(task, [own.pull_secret])
        kubernetes.set_timeout(task, int(needs.hours * 3600) + 120)
        for secret in needs.secrets:
            kubernetes.use_secret_as_env(task, secret.name, {secret.key: secret.variable})
        if needs.nodes > 1:
            return  # The job that the step submits has the accelerators; the step itself only follows it.
        if needs.accelerator != "none":
            task.set_accelerator_type(kubernetes_resource(needs.accelerator)).set_accelerator_limit(needs.count)
        for label, value in needs.node_selector.items():
            kubernetes.add_node_selector(task, label, value)
        for taint in needs.tolerations:
            operator = "Equal" if taint.value else "Exists"
            kubernetes.add_toleration(
                task, key=taint.key, operator=operator, value=taint.value or None, effect=taint.effect
            )
        if needs.spot:
            for label, value in own.spot.items():
                kubernetes.add_node_selector(task, label, value)
                kubernetes.add_toleration(task, key=label, operator="Equal", value=value, effect="NoSchedule")

    return dressed


def _refuse(recipe: Recipe, step: str) -> None:
    refuse_anywhere(recipe, step)
    needs = recipe.needs(step)
    if needs.nodes > 1:
        for name in ("spot", "node_selector", "tolerations", "secrets"):
            if getattr(needs, name):
                remedy = f"put it into the TrainingRuntime {recipe.kubeflow.runtime} (deploy/base/training)"
                raise ConfigError(f"resources.{step}.{name}: is not a TrainJob's to give its nodes; {remedy}")
    if needs.accelerator.startswith("tpu-") and not needs.node_selector:
        remedy = "give node_selector with cloud.google.com/gke-tpu-accelerator and gke-tpu-topology"
        raise ConfigError(
            f"resources.{step}.accelerator: {needs.accelerator} is chosen by labels on Kubernetes; {remedy}"
        )
    if needs.machine_type:
        remedy = "give cpu and memory, or a node_selector"
        raise ConfigError(f"resources.{step}.machine_type: Kubernetes has no machine types; {remedy}")
    for secret in needs.secrets:
        if not secret.key or "/" in secret.name:
            remedy = "give the name of a Secret and the key of an entry"
            raise ConfigError(
                f"resources.{step}.secrets: {secret.variable} is from a Secret of the namespace; {remedy}"
            )
