"""Where runs are sent to and followed: one module for each platform, one interface."""

from cappy.errors import ConfigError
from pipelines.clients.client import Client
from pipelines.recipe import Kubeflow, Platform, Vertex


def client_for(platform: Platform, kubeflow: Kubeflow, vertex: Vertex) -> Client:
    """The client of a platform; ConfigError where its address or its package is missing."""
    if platform in ("local", "docker"):
        from pipelines.clients.local import LocalClient

        return LocalClient()
    if platform == "kubeflow":
        from pipelines.clients.kubeflow import KubeflowClient

        return KubeflowClient(kubeflow)
    if platform == "vertex":
        from pipelines.clients.vertex import VertexClient

        return VertexClient(vertex)
    raise ConfigError(f"{platform}: no such platform; there are local, docker, kubeflow and vertex")
