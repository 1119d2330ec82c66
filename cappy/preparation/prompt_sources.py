"""Opens a dataset with its templates, or a mixture by its name, as `Dataset` objects of `prompted`."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from cappy.config import fingerprint
from cappy.errors import ConfigError, RecordError, quote
from cappy.preparation.bigbench import distinct_choices, parse_bigbench
from cappy.preparation.config import PreparationConfig
from cappy.preparation.files import HubDataset, parse_hub, read_file, read_hub, resolve_commit
from cappy.preparation.mixtures import Subset, load_mixture, select_subsets, to_values
from cappy.preparation.mixtures.plan import cap_rows
from cappy.preparation.prompted import Dataset, LocatedRow, MakePrompts, PromptRow, Table, Tally
from cappy.preparation.rows import Rows, Values, find_invalid_character
from cappy.preparation.templates import (
    LimitError,
    RenderedRow,
    Result,
    Template,
    find_fields,
    load_templates,
    render_rows,
)
from cappy.records.folder import sha256_of

Reader = Callable[[str], Rows]
"""Reads the rows of a split."""


def open_templated_dataset(config: PreparationConfig) -> tuple[list[Dataset], dict[str, str]]:
    """The dataset of `source` with its templates, and the hash or commit of each of its inputs by name.

    Raises ConfigError if the source or the templates do not exist.
    """
    hub = parse_hub(config.source) if config.source.startswith("hub:") else None
    name = config.dataset or (
        "/".join(filter(None, (hub.repository.partition("/")[2], hub.configuration))) if hub else ""
    )
    if not name:
        raise ConfigError(
            "preparation: --templates needs --dataset, the folder of the templates, such as super_glue/rte"
        )
    templates = _select_templates(config, name)
    if hub is not None:
        commit = resolve_commit(hub)
        rows, parents = partial(read_hub, hub, commit, config.split), {hub.name: commit}
    else:
        path = Path(config.source)
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "no such file"
            raise ConfigError(f"{path}: {problem}; with --templates, --source is a file or hub:org/name")
        rows, parents = partial(read_file, path), {path.name: sha256_of(path)}
    table = Table(split="", rows=rows)
    return [Dataset(name=name, tables=(table,), make_prompts=_make_renderer(templates, seed=config.seed))], {
        **parents,
        **_hash_templates(templates),
    }


def open_mixture(config: PreparationConfig) -> tuple[list[Dataset], dict[str, str]]:
    """The datasets of a mixture, and the hash or commit of each input by name.

    Each dataset is read from files in the folder `local` if they exist, otherwise from the hub. Raises ConfigError if
    a dataset or its templates do not exist.
    """
    mixture = load_mixture(config.mixture or "")
    subsets = select_subsets(mixture, config.subsets).subsets
    if config.local is not None and not config.local.is_dir():
        raise ConfigError(f"{config.local}: no such folder; --local is the folder with local files of the datasets")
    if mixture.template_version and config.templates is None:
        remedy = (
            "give the folder of PromptSource templates with --templates; fetch it with cappy templates --target FOLDER"
        )
        raise ConfigError(f"preparation: mixture {mixture.name} needs templates; {remedy}")
    if config.templates is not None and not mixture.template_version:
        problem = f"--templates does not apply to mixture {mixture.name}, whose rows are already prompts"
        raise ConfigError(f"preparation: {problem}; leave it out")
    datasets, parents = [], {f"mixture {mixture.name}": fingerprint(to_values(replace(mixture, subsets=subsets)))}
    for subset in subsets:
        reader, sources = _open_subset(subset, config)
        templates = _select_templates(config, subset.dataset) if subset.templates else ()
        parents.update(sources)
        parents.update(_hash_templates(templates))
        tables = tuple(
            Table(split=split, rows=partial(reader, split), held_out=split != "train") for split in subset.splits
        )
        make_prompts = (
            _make_renderer(templates, subset.rows.get("train"), seed=config.seed) if templates else _read_prompts
        )
        datasets.append(Dataset(name=subset.name, tables=tables, make_prompts=make_prompts))
    return datasets, parents


def _open_subset(subset: Subset, config: PreparationConfig) -> tuple[Reader, dict[str, str]]:
    """The reader of a subset's splits, and the sha256 of its files or the commit of its hub dataset."""
    files = {split: _find_local_file(subset, split, config.local) for split in subset.splits} if config.local else {}
    if files and all(files.values()):
        sha256s = {path.name: sha256_of(path) for path in files.values() if path}
        return lambda split: read_file(files[split] or Path()), sha256s
    if subset.manual:
        names = ", ".join(f"{_stem(subset)}.{split}.jsonl" for split in subset.splits)
        remedy = f"{subset.manual} Put it under --local FOLDER as {names}, or leave it out with --subsets"
        raise ConfigError(f"preparation: {subset.name} must be downloaded by hand; {remedy}")
    dataset = HubDataset(repository=subset.repository, configuration=subset.configuration, revision=subset.revision)
    try:
        commit = resolve_commit(dataset)
    except ConfigError as error:
        if config.local is None:
            raise
        names = ", ".join(f"{_stem(subset)}.{split}.jsonl" for split in subset.splits)
        raise ConfigError(f"{error}, or put it under {config.local} as {names}") from error
    return partial(read_hub, dataset, commit), {dataset.name: commit}


def _find_local_file(subset: Subset, split: str, folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{_stem(subset)}.{split}.*"))), None)


def _stem(subset: Subset) -> str:
    return subset.name.replace("/", "_")


def _select_templates(config: PreparationConfig, dataset: str) -> tuple[Template, ...]:
    if config.templates is None:
        return ()
    if not config.templates.is_dir():
        remedy = "fetch them with cappy templates --target FOLDER"
        raise ConfigError(f"{config.templates}: no such folder; {remedy}")
    templates = load_templates(config.templates, dataset)
    included = [pattern for pattern in config.template if not pattern.startswith("!")]
    excluded = [pattern.removeprefix("!") for pattern in config.template if pattern.startswith("!")]
    selected = tuple(
        template
        for template in templates
        if (not included or any(fnmatchcase(template.name, pattern) for pattern in included))
        and not any(fnmatchcase(template.name, pattern) for pattern in excluded)
    )
    if not selected:
        names = ", ".join(template.name for template in templates)
        raise ConfigError(
            f"preparation: --template: {dataset} has no matching template; choose one of {quote(names, 400)}"
        )
    return selected


def _hash_templates(templates: Sequence[Template]) -> dict[str, str]:
    """One hash of all templates of a dataset, so that an edited template counts as a different input."""
    if not templates:
        return {}
    text = repr([(t.name, t.jinja, t.answer_choices, t.original_task) for t in templates])
    return {f"templates of {templates[0].dataset}": hashlib.sha256(text.encode()).hexdigest()}


def _make_renderer(templates: Sequence[Template], num_rows: int | None = None, *, seed: int) -> MakePrompts:
    """Returns a function that renders each row with its templates.

    If a training split of `num_rows` is capped, each template gets evenly spaced rows, with a different offset for each
    template.
    """
    required_fields = [find_fields(template) for template in templates]
    rows_per_template = cap_rows(num_rows, len(templates)) if num_rows else 0

    def select_templates(row_index: int) -> list[int]:
        num_templates = len(templates)
        if not num_rows:
            return list(range(num_templates))
        offsets = [index * num_rows // (rows_per_template * num_templates) for index in range(num_templates)]
        return [
            index
            for index, offset in enumerate(offsets)
            if _is_sampled(row_index + offset, num_rows, rows_per_template)
        ]

    def render(rows: Iterable[LocatedRow], tally: Tally) -> Iterator[tuple[LocatedRow, list[PromptRow]]]:
        pending: deque[tuple[LocatedRow, list[int]]] = deque()

        def make_jobs() -> Iterator[tuple[Values, list[Template]]]:
            for row in rows:
                row_index, _, values = row
                names = {name.replace("-", "_") for name in values} if tally.on_missing_field == "fail" else None
                indexes = select_templates(row_index)
                pending.append((row, indexes))
                yield values, [templates[i] for i in indexes if names is None or required_fields[i] <= names]

        for results in render_rows(make_jobs(), seed=seed):
            row, indexes = pending.popleft()
            remaining_results = iter(results)
            prompts_or_none = (
                _make_prompt(templates[index], required_fields[index], row, remaining_results, tally)
                for index in indexes
            )
            yield row, [prompt for prompt in prompts_or_none if prompt is not None]

    return render


def _is_sampled(index: int, num_rows: int, rows_per_template: int) -> bool:
    """Whether a row is among `rows_per_template` evenly spaced rows of `num_rows`."""
    return index * rows_per_template // num_rows != (index - 1) * rows_per_template // num_rows


def _make_prompt(
    template: Template, required_fields: frozenset[str], row: LocatedRow, results: Iterator[Result], tally: Tally
) -> PromptRow | None:
    """The prompt of a row with a template; None if rendering failed (counted in `tally`) or the result is blank.

    The next of `results` belongs to the template, unless it was not rendered because of a missing field.
    """
    name = f"{template.dataset} {template.name}"
    tally.attempts[name] += 1
    _, where, values = row
    missing = _describe_missing_fields(template, required_fields, values)
    rendered = RecordError(missing) if missing and tally.on_missing_field == "fail" else next(results)
    if isinstance(rendered, RenderedRow):
        rendered = _check_text(f"{template.dataset}: template {quote(template.name)}", rendered) or rendered
    if isinstance(rendered, RecordError):
        tally.fail(name, f"{where}: {rendered}", exceeded_limit=isinstance(rendered, LimitError))
        return None
    tally.succeed(name)
    if missing:
        tally.add_missing_fields(name, f"{where}: {missing}")
    if rendered is None:
        tally.counts["dropped_blank"] += 1
        return None
    choices = distinct_choices(rendered.choices, [rendered.target])
    if rendered.choices and not choices:
        tally.counts["answer_not_among_choices"] += 1
    return PromptRow(
        instruction=rendered.instruction,
        references=(rendered.target,),
        choices=choices,
        template=template.name,
        original_task=template.original_task,
    )


def _check_text(where: str, rendered: RenderedRow) -> RecordError | None:
    """An error for a rendered text that cannot be stored, because of a NUL or an unpaired surrogate."""
    for name, text in (("instruction", rendered.instruction), ("target", rendered.target)):
        if problem := find_invalid_character(text):
            return RecordError(f"{where}: {name} contains {problem}")
    return None


def _describe_missing_fields(template: Template, required_fields: frozenset[str], values: Values) -> str:
    """Describes the fields that the template reads but the row lacks; PromptSource renders them as empty text."""
    missing = sorted(required_fields - {name.replace("-", "_") for name in values})
    if not missing:
        return ""
    fields = quote(", ".join(values), limit=120)
    return (
        f"{template.dataset}: template {quote(template.name)} reads {', '.join(missing)}, which the row lacks; "
        f"fields found: {fields}"
    )


def _read_prompts(rows: Iterable[LocatedRow], tally: Tally) -> Iterator[tuple[LocatedRow, list[PromptRow]]]:
    """The prompt of each row of tasksource/bigbench; none if it is blank or has no answer."""
    for row in rows:
        _, where, values = row
        yield row, list(_read_prompt(where, values, tally))


def _read_prompt(where: str, values: Values, tally: Tally) -> Iterator[PromptRow]:
    fields = parse_bigbench(where, values)
    references = tuple(text for text in fields["references"] if text.strip())
    if isinstance(fields["instruction"], str) and fields["instruction"].strip() and references:
        yield PromptRow(instruction=fields["instruction"], references=references, choices=tuple(fields["choices"]))
    else:
        tally.counts["dropped_blank"] += 1
