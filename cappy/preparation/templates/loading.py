"""PromptSource's template files: one YAML for each dataset or subset, read as plain values, never as Python objects."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cappy.errors import ConfigError, shown
from cappy.yaml_files import FAST_LOADER, MAX_CHARACTERS, load_yaml

FILE = "templates.yaml"
_NEAR_NAMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One template of a dataset; `dataset` names the subset too: "super_glue/rte".

    `jinja` gives the instruction and the target, divided by `|||`; `answer_choices` gives the choices of a
    classification template, divided likewise, and is empty for an open-ended one. `original_task` is false for a
    template that turns its dataset's task around.
    """

    name: str
    id: str
    dataset: str
    jinja: str
    answer_choices: str = ""
    original_task: bool = False
    choices_in_prompt: bool = False
    metrics: tuple[str, ...] = ()


def load_templates(folder: Path, dataset: str) -> tuple[Template, ...]:
    """The templates of a dataset, such as "imdb" or "super_glue/rte", sorted by name.

    `folder` holds <dataset>[/<subset>]/templates.yaml. ConfigError if it has no such file, or another in its place.
    """
    path = _path(folder, dataset)
    found = [_template(path, dataset, key, values) for key, values in _mappings(path).items()]
    found.sort(key=lambda template: template.name)
    for former, template in pairwise(found):
        if former.name == template.name:
            raise ConfigError(f"{path}: two templates are called {shown(template.name)}; rename one of them")
    return tuple(found)


class _Loader(FAST_LOADER):  # type: ignore[misc] # a class of PyYAML's
    """A safe loader that takes PromptSource's two tags for the mappings that they are."""


def _mapping(loader: Any, node: yaml.Node) -> dict[Any, Any]:
    mapping: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return mapping


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


def _path(folder: Path, dataset: str) -> Path:
    parts = PurePosixPath(dataset).parts
    if not parts or dataset.startswith("/") or ".." in parts:
        raise ConfigError(f"{shown(dataset)} is not the name of a dataset, such as imdb or super_glue/rte")
    path = folder.joinpath(*parts, FILE)
    if not path.is_file():
        names = sorted(file.parent.relative_to(folder).as_posix() for file in folder.rglob(FILE))
        if not names:
            raise ConfigError(f"{folder}: holds no {FILE}; name the folder of PromptSource's templates, or fetch them")
        near = [name for name in names if dataset in name.split("/")] or get_close_matches(dataset, names, _NEAR_NAMES)
        remedy = f"choose of {', '.join(near)}" if near else f"choose one of the {len(names)} folders there"
        raise ConfigError(f"{folder}: has no templates for {shown(dataset)}; {remedy}")
    return path


def _mappings(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            content = load_yaml(file.read(MAX_CHARACTERS + 1), _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{where}: is no file of templates ({shown(reason, limit=120)}); fetch it again") from error
    templates = content.get("templates") if isinstance(content, Mapping) else None
    if not isinstance(templates, Mapping) or not templates:
        raise ConfigError(f"{path}: has no mapping 'templates' with a template in it; fetch it again")
    return templates


def _template(path: Path, dataset: str, key: Any, values: Any) -> Template:
    where = f"{path}: template {shown(key)}"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: must be a mapping, got {shown(values)}; fetch the file again")
    metadata = values.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"{where}: metadata must be a mapping, got {shown(metadata)}; fetch the file again")
    metrics = metadata.get("metrics") or ()
    if not isinstance(metrics, list | tuple):
        raise ConfigError(f"{where}: metrics must be a list, got {shown(metrics)}; fetch the file again")
    return Template(
        name=_text(where, values, "name"),
        id=str(key),
        dataset=dataset,
        jinja=_text(where, values, "jinja"),
        answer_choices=_text(where, values, "answer_choices") if values.get("answer_choices") is not None else "",
        # T0 asks whether it is true, so null counts as false.
        original_task=metadata.get("original_task") is True,
        choices_in_prompt=metadata.get("choices_in_prompt") is True,
        metrics=tuple(map(str, metrics)),
    )


def _text(where: str, values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} must be a text, got {shown(value)}; put it in quotes")
    return value
