"""The contract of every component: its parameters are its config's, its body names its step, its imports are light."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import cappy
import components
from cappy.steps import STEP_SPECS
from cappy.worker import config_class

FOLDER = Path(components.__file__).parent
SHARED = {"settings", "fingerprint", "shard", "run"}


def tree(name: str) -> ast.Module:
    return ast.parse((FOLDER / f"{name}.py").read_text())


def function(name: str) -> ast.FunctionDef:
    return next(node for node in tree(name).body if isinstance(node, ast.FunctionDef))


def calls(name: str, called: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(function(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == called
    ]


def signature(step: str) -> inspect.Signature:
    module = __import__(f"components.{step}", fromlist=[step])
    result: Any = getattr(module, step).python_func
    return inspect.signature(result)


def artifacts(step: str) -> set[str]:
    return {
        argument.arg
        for argument in function(step).args.args
        if isinstance(argument.annotation, ast.Subscript)
        and isinstance(argument.annotation.value, ast.Name)
        and argument.annotation.value.id in ("Input", "Output")
    }


def test_there_is_one_component_per_step_and_the_exit_step() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "component"}
    assert modules == {*STEP_SPECS, "tracking"}


@pytest.mark.parametrize("step", STEP_SPECS)
def test_a_component_is_one_call_that_names_its_step(step: str) -> None:
    (call,) = calls(step, "launch")
    assert isinstance(call.args[0], ast.Constant)
    assert call.args[0].value == step
    assert function(step).name == step
    assert ast.get_docstring(function(step))
    assert (function(step).end_lineno or 0) - function(step).lineno < 32


@pytest.mark.parametrize("step", STEP_SPECS)
def test_a_components_parameters_are_settings_of_its_config_with_the_same_defaults(step: str) -> None:
    config: Any = config_class(step)
    fields = config.__pydantic_fields__
    typed = {name: each for name, each in signature(step).parameters.items() if name not in artifacts(step) | SHARED}
    assert set(typed) == set(STEP_SPECS[step].parameters)
    assert len(typed) <= 6
    for name, each in typed.items():
        assert name in fields, f"{step} has no setting {name}"
        if each.default is not inspect.Parameter.empty:
            assert each.default == fields[name].default, f"{step}: {name}"


@pytest.mark.parametrize("step", STEP_SPECS)
def test_a_component_passes_every_setting_that_a_pipeline_fills(step: str) -> None:
    passed = {keyword.arg for call in calls(step, "launch") for keyword in call.keywords if keyword.arg}
    keys = {
        key.value
        for node in ast.walk(function(step))
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert {*STEP_SPECS[step].artifacts, *STEP_SPECS[step].parameters} <= {*passed, *keys}
    assert "fingerprint" in passed
    # The run's id is not an input of a step that a later run may reuse.
    assert ("run" in passed) is not STEP_SPECS[step].cached
    config: Any = config_class(step)
    assert set(STEP_SPECS[step].artifacts) <= set(config.__pydantic_fields__)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_component_module_imports_kfp_and_the_standard_library_alone(path: Path) -> None:
    import sys

    allowed = {"kfp", "components", *sys.stdlib_module_names}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed


def test_images_carry_the_version_and_a_name_that_the_local_runner_accepts() -> None:
    from components import TRAINER_IMAGE, WORKER_IMAGE

    for image in (TRAINER_IMAGE, WORKER_IMAGE):
        assert image.endswith(f":{cappy.__version__}")
        assert "python" in image


def test_nothing_is_installed_when_a_component_starts() -> None:
    from components.annotation import annotation

    made: Any = annotation
    container = made.component_spec.implementation.container
    assert "pip install" not in " ".join(container.command)
