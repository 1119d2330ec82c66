"""Generates the data files of the mixtures from sources.json, PromptSource's templates and two published tables.

    python -m cappy.preparation.mixtures --templates FOLDER --published FOLDER

`--templates` is the folder promptsource/templates of any version of PromptSource. `--published` contains
t0_datasets.csv (t-zero, t0/datasets.csv) and bigbench45_sizes_and_scores.csv (columns task, train, validation).
sources.json is only read.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from cappy.errors import CappyError, ConfigError
from cappy.preparation.mixtures import (
    NAMES,
    Mixture,
    MixtureValues,
    Subset,
    SubsetValues,
    TemplateFacts,
    read_data,
    to_values,
)
from cappy.preparation.templates import load_templates

TEMPLATE_VERSION = "promptsource 0.1.0"
"""The version that T0 pins."""

CHOICES_AT_VERSION: Mapping[tuple[str, str], float | None] = {
    ("wiqa", "effect_with_label_answer"): None,
    ("wiqa", "effect_with_string_answer"): None,
    ("wiqa", "does_the_supposed_perturbation_have_an_effect"): None,
    ("wiqa", "which_of_the_following_is_the_supposed_perturbation"): None,
    ("trec", "fine_grained_open"): 47,
    ("trec", "fine_grained_open_context_first"): 47,
}
"""Numbers of choices at TEMPLATE_VERSION that later versions changed, so that any version makes the same files.

All templates of `t0` and `heldout` were compared at 0.1.0, at 0.2.3 and at a commit after it: their names and every
other number of choices are equal.
"""

SAMPLES = {"t0": 10, "heldout": 0, "bigbench45": 17}
"""Responses sampled for each prompt: for t0, 5 by BART0 and 5 by T0-3B; for bigbench45, the published 17."""

_JOIN_CALL = re.compile(r"""join\(\s*(["'])\s*\|\|\|\s*\1\s*\)""")


def main() -> int:
    """Reads the command line and writes the files; returns 1 on a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m cappy.preparation.mixtures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--templates", type=Path, required=True, help="PromptSource's folder of templates")
    parser.add_argument("--published", type=Path, required=True, help="folder of the two published tables")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "data", help="folder to write")
    arguments = parser.parse_args()
    try:
        paths = write_mixtures(arguments.templates, arguments.published, arguments.target)
    except CappyError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write("".join(f"{path}\n" for path in paths))
    return 0


def write_mixtures(templates: Path, published: Path, target: Path) -> list[Path]:
    """Writes one JSON file for each mixture to `target`; the same input gives the same bytes.

    `templates` is the templates folder of any version of PromptSource; `published` contains t0_datasets.csv and
    bigbench45_sizes_and_scores.csv. Raises ConfigError if a file, or a dataset in one, is missing.
    """
    paths = []
    for name in NAMES:
        path = target / f"{name}.json"
        path.write_text(_to_compact_json(to_values(make_mixture(name, templates, published))), encoding="utf-8")
        paths.append(path)
    return paths


def make_mixture(name: str, templates: Path, published: Path) -> Mixture:
    """Makes a mixture by name; see `write_mixtures` for the folders."""
    sources: list[SubsetValues] = json.loads(read_data("sources.json"))[name]
    if name == "bigbench45":
        sizes = _read_table(published / "bigbench45_sizes_and_scores.csv")
        subsets = [_make_bigbench_subset(sources[0], row) for row in sizes]
    elif name == "t0":
        train_rows = [row for row in _read_table(published / "t0_datasets.csv") if row["do_train"] == "BASE"]
        rows = {
            "/".join(filter(None, (row["HF_name"], row["subset"]))): _parse_size(row["train_size"])
            for row in train_rows
        }
        _check_same_names(rows, sources, published / "t0_datasets.csv")
        subsets = [_make_subset({**source, "rows": {"train": rows[source["name"]]}}, templates) for source in sources]
    else:
        subsets = [_make_subset(source, templates) for source in sources]
    return Mixture(
        name=name,
        template_version="" if name == "bigbench45" else TEMPLATE_VERSION,
        samples=SAMPLES[name],
        subsets=tuple(subsets),
    )


def count_choices(answer_choices: str | None, per_row: float | None) -> float | None:
    """The number of choices in PromptSource's `answer_choices`; None if it is empty.

    If it joins a list from the row, the number is `per_row`; raises ConfigError if that is None.
    """
    if not answer_choices:
        return None
    if not _JOIN_CALL.search(answer_choices):
        return len(answer_choices.split("|||"))
    if per_row is None:
        raise ConfigError(
            f"{answer_choices}: the number of choices depends on the row; add choices_per_row and its source to "
            "sources.json"
        )
    return per_row


def _make_subset(source: SubsetValues, templates: Path) -> Subset:
    fields = {key: value for key, value in source.items() if key != "choices_per_row"}
    facts = _read_template_facts(source["dataset"], templates, source.get("choices_per_row"))
    return TypeAdapter(Subset).validate_python({**fields, "templates": tuple(facts)})


def _make_bigbench_subset(source: SubsetValues, sizes: Mapping[str, str]) -> Subset:
    task = sizes["task"]
    rows = {split: _parse_size(sizes[split]) for split in ("train", "validation")}
    return TypeAdapter(Subset).validate_python({**source, "name": task, "configuration": task, "rows": rows})


def _read_template_facts(dataset: str, templates: Path, per_row: float | None) -> Iterator[TemplateFacts]:
    path = templates / dataset / "templates.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; --templates is the folder promptsource/templates of PromptSource")
    for template in load_templates(templates, dataset):
        if (dataset, template.name) in CHOICES_AT_VERSION:
            num_choices = CHOICES_AT_VERSION[dataset, template.name]
        else:
            num_choices = count_choices(template.answer_choices or None, per_row)
        yield TemplateFacts(name=template.name, num_choices=num_choices, original_task=template.original_task)


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; --published is the folder that contains it")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _parse_size(text: str) -> int | None:
    return int(text) if text else None


def _check_same_names(rows: Mapping[str, int | None], sources: list[SubsetValues], path: Path) -> None:
    names = {source["name"] for source in sources}
    if names != set(rows):
        different_names = ", ".join(sorted(names ^ set(rows)))
        raise ConfigError(f"{path}: lists other datasets than sources.json ({different_names}); correct sources.json")


def _to_compact_json(values: MixtureValues) -> str:
    """JSON with one line for each subset and template, which makes diffs readable."""
    subsets = []
    for subset in values["subsets"]:
        header = json.dumps({key: value for key, value in subset.items() if key != "templates"}, ensure_ascii=False)
        lines = ",\n".join(f"   {json.dumps(template, ensure_ascii=False)}" for template in subset.get("templates", []))
        subsets.append(f'  {header[:-1]}, "templates": [\n{lines}\n  ]}}' if lines else f"  {header}")
    header = json.dumps({key: value for key, value in values.items() if key != "subsets"}, ensure_ascii=False)
    return f'{header[:-1]},\n "subsets": [\n' + ",\n".join(subsets) + "\n ]}\n"


if __name__ == "__main__":
    sys.exit(main())
