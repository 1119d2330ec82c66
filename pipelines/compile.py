"""`python -m pipelines.compile adapt`: a pipeline as the YAML that Kubeflow and Vertex take."""

import importlib
import sys
import tempfile
from pathlib import Path

import pipelines


def compiled(name: str) -> str:
    """The YAML of pipeline `name`; needs kfp and nothing heavier."""
    from kfp.compiler import Compiler

    function = getattr(importlib.import_module(pipelines.PIPELINES[name]), name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        Compiler().compile(function, str(path))
        return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.write(compiled(sys.argv[1]))
