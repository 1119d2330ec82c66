"""Loads PromptSource templates from YAML and renders them as PromptSource v0.1.0 and T0 do, with resource limits.

`load_templates` loads the templates of a dataset without constructing the Python objects of the YAML tags. `render`
renders a row with a template to an instruction, a target and choices in a child process; `render_rows` renders many
rows with many templates. `fetch` downloads the files. `cappy.rendering` has the limits, and
`cappy.rendering.promptsource` the rendering itself.
"""

import hashlib
import io
import json
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp

import yaml

from cappy.errors import ConfigError, FolderError, RecordError, quote
from cappy.rendering import jobs
from cappy.rendering.child import encode
from cappy.rendering.jobs import MAX_SECONDS, Failure, RenderJob, TemplateSource
from cappy.untrusted import FAST_LOADER, MAX_CHARACTERS, Loader, load_yaml

__all__ = [
    "LimitError",
    "RenderedRow",
    "Result",
    "Template",
    "fetch",
    "find_fields",
    "fixed_choices",
    "load_templates",
    "render",
    "render_rows",
]

_FILE_NAME = "templates.yaml"
_MAX_SUGGESTIONS = 5
_KIND = "promptsource"
_RESERVED_FIELD = "answer_choices"
_to_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One template of a dataset; `dataset` includes the subset: "super_glue/rte".

    `jinja` renders to the instruction and the target, separated by `|||`; `answer_choices` renders to the choices of a
    classification template, separated the same way, and is empty for an open-ended template. `original_task` is false
    for a template that inverts the task of its dataset.
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
    """Loads the templates of a dataset, such as "imdb" or "super_glue/rte", sorted by name.

    `folder` contains <dataset>[/<subset>]/templates.yaml. Raises ConfigError if the file is missing or invalid.
    """
    path = _find_file(folder, dataset)
    templates = [_parse_template(path, dataset, key, values) for key, values in _read_mappings(path).items()]
    templates.sort(key=lambda template: template.name)
    for previous, template in pairwise(templates):
        if previous.name == template.name:
            raise ConfigError(f"{path}: two templates are named {quote(template.name)}; rename one of them")
    return tuple(templates)


class LimitError(RecordError):
    """A template exceeded its limit on time or memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRow:
    """A rendered row. `choices` is empty for an open-ended template; the target need not be among them."""

    instruction: str
    target: str
    choices: tuple[str, ...] = ()


Result = RenderedRow | RecordError | None
"""A rendered row or its error; None if the instruction or target is blank, in which case T0 drops the row."""
Row = Mapping[str, object]


def render(template: Template, row: Row, *, seed: int = 0, seconds: float = MAX_SECONDS) -> RenderedRow | None:
    """Renders a row with a template; None if the instruction or target is blank, in which case T0 drops the row.

    Random choices in a template depend only on the row and the seed. The row is not modified. Raises RecordError if
    rendering fails, takes longer than `seconds` of CPU time, or does something forbidden, and ConfigError if the
    template does not compile.
    """
    ((result,),) = render_rows([(row, [template])], seed=seed, seconds=seconds)
    if isinstance(result, RecordError):
        raise result
    return result


def render_rows(
    rows: Iterable[tuple[Row, Sequence[Template]]], *, seed: int = 0, seconds: float = MAX_SECONDS
) -> Iterator[list[Result]]:
    """Renders each row with its templates, like `render`; yields one list of results per row and reads rows ahead.

    A failure is returned as a RecordError in place of the result. Raises ConfigError if a template does not compile.
    """
    queue: deque[tuple[Row, Sequence[Template], str]] = deque()
    items_by_id: dict[int, tuple[Template, tuple[TemplateSource, str]]] = {}

    def item(template: Template) -> tuple[TemplateSource, str]:
        if id(template) not in items_by_id:  # hashing a template would dominate the run time
            items_by_id[id(template)] = template, (_as_source(template), f"{seed} {template.id}")
        return items_by_id[id(template)][1]

    def render_jobs() -> Iterator[RenderJob]:
        for row, templates in rows:
            values, problem = _encode_row(row)
            queue.append((row, templates, problem))
            items = () if problem else tuple(map(item, templates))
            yield RenderJob(values=values, items=items, seconds=seconds)

    for outcomes in jobs.run(_KIND, render_jobs()):
        row, templates, problem = queue.popleft()
        if problem:
            yield [RecordError(f"{_where(template)}: {problem}") for template in templates]
        else:
            yield [
                _parse_outcome(template, row, outcome) for template, outcome in zip(templates, outcomes, strict=True)
            ]


def fixed_choices(template: Template) -> tuple[str, ...] | None:
    """The choices of a template if they are the same for every row; None if they depend on the row or it has none.

    Raises ConfigError if the template does not compile.
    """
    find_fields(template)
    ((outcome,),) = jobs.run(_KIND, [RenderJob(items=((_as_source(template), None),))])
    if isinstance(outcome, Failure):
        raise _config_error(template, outcome)
    return None if outcome is None else tuple(_check_texts(template, outcome))


def find_fields(template: Template) -> frozenset[str]:
    """The fields of a row that the template reads; raises ConfigError if it does not compile.

    PromptSource silently renders a missing field as an empty text, so callers must check for missing fields.
    """
    outcome = jobs.load(_as_source(template))
    if isinstance(outcome, Failure):
        raise _config_error(template, outcome)
    return frozenset(_check_texts(template, outcome))


def _as_source(template: Template) -> TemplateSource:
    return TemplateSource(_KIND, (template.jinja, template.answer_choices))


def _encode_row(row: Row) -> tuple[str, str]:
    """The row as JSON for a job, and a description of the problem if it has one, or an empty text."""
    if any(name.replace("-", "_") == _RESERVED_FIELD for name in row):
        return "{}", f"the row has a field {_RESERVED_FIELD}, which is reserved for the template; rename the column"
    try:
        return _to_json(encode(row)), ""
    except RecursionError:
        return "{}", "the values of the row are nested too deeply; fix the row"


def _parse_outcome(template: Template, row: Row, outcome: object) -> Result:
    if outcome is None:
        return None
    if not isinstance(outcome, Failure):
        if not isinstance(outcome, list) or len(outcome) != 3:
            raise TypeError(f"{_where(template)}: the child answers {quote(outcome)}")
        instruction, target = _check_texts(template, outcome[:2])
        return RenderedRow(instruction=instruction, target=target, choices=tuple(_check_texts(template, outcome[2])))
    if outcome.loading:
        raise _config_error(template, outcome)
    names = quote(", ".join(map(str, row)) or "none", limit=120)
    remedy = f"fields of the row: {names}; fix the row or leave the template out"
    error = LimitError if outcome.exceeded_limit else RecordError
    return error(f"{_where(template)} fails on the row ({outcome.reason}); {remedy}")


def _check_texts(template: Template, texts: object) -> list[str]:
    """Checks that an outcome is a list of texts, because outcomes of a child process are not trusted."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{_where(template)}: the child answers {quote(texts)}")
    return texts


def _config_error(template: Template, failure: Failure) -> ConfigError:
    return ConfigError(f"{_where(template)} does not compile ({failure.reason}); fix it or leave it out")


def _where(template: Template) -> str:
    return f"{template.dataset}: template {quote(template.name)}"


class _Loader(FAST_LOADER):  # type: ignore[misc, valid-type] # a class of PyYAML's
    """A safe loader that reads PromptSource's two tags as plain mappings."""


def _construct_mapping(loader: Loader, node: yaml.MappingNode) -> dict[Hashable, object]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!Template", _construct_mapping)
_Loader.add_constructor("!TemplateMetadata", _construct_mapping)


def _find_file(folder: Path, dataset: str) -> Path:
    parts = PurePosixPath(dataset).parts
    if not parts or dataset.startswith("/") or ".." in parts:
        raise ConfigError(f"{quote(dataset)} is not the name of a dataset, such as imdb or super_glue/rte")
    path = folder.joinpath(*parts, _FILE_NAME)
    if not path.is_file():
        names = sorted(file.parent.relative_to(folder).as_posix() for file in folder.rglob(_FILE_NAME))
        if not names:
            raise ConfigError(
                f"{folder}: contains no {_FILE_NAME}; give the folder of PromptSource's templates, or "
                "download them with cappy templates"
            )
        similar = [name for name in names if dataset in name.split("/")] or get_close_matches(
            dataset, names, _MAX_SUGGESTIONS
        )
        remedy = f"choose one of {', '.join(similar)}" if similar else f"choose one of the {len(names)} folders there"
        raise ConfigError(f"{folder}: has no templates for {quote(dataset)}; {remedy}")
    return path


def _read_mappings(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as file:
            content = load_yaml(file.read(MAX_CHARACTERS + 1), _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{where}: is not a templates file ({quote(reason, limit=120)}); fetch it again") from error
    templates = content.get("templates") if isinstance(content, Mapping) else None
    if not isinstance(templates, Mapping) or not templates:
        raise ConfigError(f"{path}: has no mapping 'templates', or it is empty; fetch it again")
    return templates


def _parse_template(path: Path, dataset: str, key: object, values: object) -> Template:
    where = f"{path}: template {quote(key)}"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: must be a mapping, got {quote(values)}; fetch the file again")
    metadata = values.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"{where}: metadata must be a mapping, got {quote(metadata)}; fetch the file again")
    metrics = metadata.get("metrics") or ()
    if not isinstance(metrics, list | tuple):
        raise ConfigError(f"{where}: metrics must be a list, got {quote(metrics)}; fetch the file again")
    return Template(
        name=_read_text(where, values, "name"),
        id=str(key),
        dataset=dataset,
        jinja=_read_text(where, values, "jinja"),
        answer_choices=_read_text(where, values, "answer_choices") if values.get("answer_choices") is not None else "",
        # T0 tests for true, so null counts as false.
        original_task=metadata.get("original_task") is True,
        choices_in_prompt=metadata.get("choices_in_prompt") is True,
        metrics=tuple(map(str, metrics)),
    )


def _read_text(where: str, values: Mapping[str, object], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} must be a string, got {quote(value)}; put it in quotes")
    return value


URL = "https://github.com/bigscience-workshop/promptsource/archive/refs/heads/main.tar.gz"
"""The main branch, unchanged since June 2023. `hashes.json` pins the files, not this address.

`hashes.json` lists the 279 files that this project was tested with: release 0.2.3 with the languages of each template,
and the later changes to trec, multi_news and race. Their full commit hash is not known.
"""
MAX_BYTES = 2**26
_TEMPLATES_FOLDER = ("promptsource", "templates")


def load_hashes() -> Mapping[str, str]:
    """The sha256 of every known file by its path below the templates folder."""
    hashes: dict[str, str] = json.loads(Path(__file__).with_name("hashes.json").read_text())
    return hashes


def fetch(target: Path, *, url: str = URL, hashes: Mapping[str, str] | None = None, seconds: float = 60) -> int:
    """Downloads the template files to `target`, a new folder, and returns their number.

    `url` is a tar.gz of the repository; `seconds` is the timeout of each read. Nothing is written unless every file of
    `hashes` (by default `load_hashes()`) is in the archive with its sha256; other files are skipped. Raises ConfigError
    if the target exists or the download fails, and FolderError if the archive does not contain these files.
    """
    if target.exists():
        raise ConfigError(f"{target}: already exists; choose a new folder")
    expected = load_hashes() if hashes is None else hashes
    files = _check_hashes(url, _read_members(url, _download(url, seconds)), expected)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(files)


def _download(url: str, seconds: float) -> bytes:
    remedy = "check the address and the network, or download it elsewhere and give its templates folder"
    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"{quote(url)}: is not an http(s) address; {remedy}")
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:  # noqa: S310 # the scheme is checked above
            content: bytes = response.read(MAX_BYTES + 1)
    except (OSError, HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # It holds the response, and so the connection.
        raise ConfigError(f"{url}: download failed ({quote(str(error), limit=120)}); {remedy}") from error
    if len(content) > MAX_BYTES:
        raise FolderError(f"{url}: sends more than {MAX_BYTES:,} bytes; {remedy}")
    return content


def _read_members(url: str, content: bytes) -> dict[str, bytes]:
    """The files in the templates folder, by path in it; raises FolderError if a path leads out of the archive."""
    members, remaining_bytes = {}, MAX_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise FolderError(
                        f"{url}: {quote(member.name)} has a path that leads out of the archive; use another address"
                    )
                remaining_bytes -= member.size
                if remaining_bytes < 0:
                    raise FolderError(f"{url}: unpacks to more than {MAX_BYTES:,} bytes; use another address")
                file = archive.extractfile(member) if member.isreg() and path.parts[1:3] == _TEMPLATES_FOLDER else None
                if file is not None:
                    members[PurePosixPath(*path.parts[3:]).as_posix()] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise FolderError(f"{url}: is not a tar.gz ({quote(str(error))}); check the address, or fetch again") from error
    return members


def _check_hashes(url: str, members: Mapping[str, bytes], expected: Mapping[str, str]) -> dict[str, bytes]:
    remedy = "nothing was written; fetch again, or use the default address"
    for name, sha256 in expected.items():
        if name not in members:
            raise FolderError(f"{url}: has no {name}; {remedy}")
        if hashlib.sha256(members[name]).hexdigest() != sha256:
            raise FolderError(f"{url}: {name} differs from the known file (sha256); {remedy}")
    return {name: members[name] for name in expected}
