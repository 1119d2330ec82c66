"""Datasets of the hub, streamed by the real clients from a small fake of it: each run is a process of its own.

What the fake cannot show is whether the addresses in the mixtures exist.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hub_server import Files, commit_of, parquet, readme, serving
from wording import assert_names, raises_naming

from cappy.errors import ConfigError
from cappy.preparation.files import HubDataset, parse_hub
from cappy.records import Instance, Manifest, read, read_manifest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
QUIZ = parquet([{"question": f"q{n}", "answer": f"a{n}"} for n in range(12)])
CHANGED = parquet([{"question": f"new {n}", "answer": f"a{n}"} for n in range(12)])


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., tuple[Manifest, list[Instance]]]:
    """prepared(repositories, *flags): what a process of its own prepared from a hub of these repositories."""

    def run(repositories: Mapping[str, Mapping[str, Files]], *flags: str) -> tuple[Manifest, list[Instance]]:
        target = tmp_path / f"target{len(list(tmp_path.glob('target*')))}"
        done = preparation(repositories, tmp_path, *flags, "--target", str(target))
        assert done.returncode == 0, done.stderr
        return read_manifest(target), list(read(target))

    return run


EACH = """
import json, sys
from cappy.cli import main
statuses = []
for words in json.loads(sys.argv[1]):
    sys.stderr.write("\\n" if statuses else "")
    try:
        main(["preparation", *words])
    except SystemExit as ended:
        statuses.append(ended.code or 0)
sys.exit(max(statuses) if min(statuses) == max(statuses) else f"they ended with {statuses}")
"""


def preparation(
    repositories: Mapping[str, Mapping[str, Files]], folder: Path, *flags: str
) -> "subprocess.CompletedProcess[str]":
    return preparations(repositories, folder, flags)


def preparations(
    repositories: Mapping[str, Mapping[str, Files]], folder: Path, *runs: Sequence[str]
) -> "subprocess.CompletedProcess[str]":
    """One process for several runs, whose status is that of each; an empty line stands between their words."""
    with serving(repositories) as address:
        return subprocess.run(
            [sys.executable, "-c", EACH, json.dumps([[*flags, "--work", str(folder / "work")] for flags in runs])],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )


def test_a_dataset_is_streamed_at_the_commit_that_its_revision_is_now(
    prepared: Callable[..., tuple[Manifest, list[Instance]]], tmp_path: Path
) -> None:
    columns = ["--columns", "instruction=question", "--columns", "reference=answer"]
    files = {"data/train-00000-of-00001.parquet": QUIZ, "data/test-00000-of-00001.parquet": CHANGED}
    manifest, result = prepared({"org/quiz": {"main": files}}, "--source", "hub:org/quiz", *columns)
    assert [(i.instruction, i.references) for i in result] == [(f"q{n}", (f"a{n}",)) for n in range(12)]
    assert manifest.facts["made_of"] == {"hub:org/quiz@main": commit_of(files)}
    assert manifest.parents == (commit_of(files),)
    moved = {**files, "data/train-00000-of-00001.parquet": CHANGED}
    # The branch moves on: other work, and not what lies finished.
    pinned = ["--source", f"hub:org/quiz@{commit_of(files)}", *columns]
    runs = (["--source", "hub:org/quiz", *columns], pinned, [*pinned, "--split", "test"])
    targets = [str(tmp_path / name) for name in ("moved", "pinned", "tested")]
    both = {"org/quiz": {"main": moved, "old": files}}
    flags = [[*words, "--target", target] for words, target in zip(runs, targets, strict=True)]
    done = preparations(both, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    later, others = read_manifest(tmp_path / "moved"), list(read(tmp_path / "moved"))
    assert (others[0].instruction, later.parents) == ("new 0", (commit_of(moved),))
    assert [i.instruction for i in read(tmp_path / "pinned")] == [f"q{n}" for n in range(12)]
    assert {i.instruction for i in read(tmp_path / "tested")} == {f"new {n}" for n in range(12)}


def test_a_big_bench_task_of_the_mixture_keeps_its_published_test_split(
    prepared: Callable[..., tuple[Manifest, list[Instance]]],
) -> None:
    def rows(*names: str) -> bytes:
        return parquet(
            [
                {
                    "idx": n,
                    "inputs": f"Q: {name}",
                    "targets": [name],
                    "multiple_choice_targets": [],
                    "multiple_choice_scores": [],
                }
                for n, name in enumerate(names)
            ]
        )

    files = {
        "README.md": readme(tense={"train": "tense/train.parquet", "validation": "tense/validation.parquet"}),
        "tense/train.parquet": rows(*(f"t{n}" for n in range(20)), "Shared"),
        "tense/validation.parquet": rows("v0", "v1", "shared"),
    }
    manifest, result = prepared(
        {"tasksource/bigbench": {"main": files}}, "--mixture", "bigbench45", "--subsets", "tense", "--validation", "0.2"
    )
    test = [instance.instruction for instance in result if instance.split == "test"]
    assert test == ["Q: v0", "Q: v1", "Q: shared"]
    assert {i.instruction for i in result if i.split != "test"} == {f"Q: t{n}" for n in range(20)}
    assert {i.split for i in result} == {"train", "validation", "test"}
    assert {i.task for i in result} == {"tense"}
    assert manifest.metrics["dropped_shared_with_held_out"] == 1
    assert manifest.facts["made_of"]["hub:tasksource/bigbench:tense@main"] == commit_of(files)
    assert set(manifest.facts["made_of"]) == {"mixture bigbench45", "hub:tasksource/bigbench:tense@main"}


def test_the_converted_branch_is_read_by_folder(
    prepared: Callable[..., tuple[Manifest, list[Instance]]], tmp_path: Path
) -> None:
    folder = tmp_path / "templates/wiki_hop/original"
    folder.mkdir(parents=True)
    (folder / "templates.yaml").write_text(
        "dataset: wiki_hop\nsubset: original\ntemplates:\n  a: !Template\n    answer_choices: null\n    id: a\n"
        "    jinja: 'Say {{question}} ||| {{answer}}'\n    metadata: !TemplateMetadata\n      original_task: true\n"
        "    name: say\n    reference: ''\n"
    )
    files = {"original/train/0000.parquet": QUIZ, "masked/train/0000.parquet": CHANGED}
    _, result = prepared(
        {"QAngaroo/wiki_hop": {"refs/convert/parquet": files, "main": {"wiki_hop.py": b"raise SystemExit"}}},
        "--mixture", "t0", "--subsets", "wiki_hop/*", "--templates", str(tmp_path / "templates"), "--validation", "0",
    )  # fmt: skip
    assert [(i.instruction, i.references) for i in result] == [(f"Say q{n}", (f"a{n}",)) for n in range(12)]


def test_what_the_hub_does_not_have_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    files = {"data/train-00000-of-00001.parquet": QUIZ}
    sources = ["hub:org/none", "hub:org/quiz:none", "hub:org/quiz@none"]
    runs = [["--source", source, "--target", "out"] for source in sources]
    done = preparations({"org/quiz": {"main": files}}, tmp_path, *runs)
    assert done.returncode == 1, done.stderr
    for source, text in zip(sources, done.stderr.rstrip("\n").split("\n\n"), strict=True):
        name = source if "@" in source else f"{source}@main"
        assert_names(text.splitlines()[-1], f"cappy preparation: {name}: ", "from the hub", "configuration", "revision")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_dataset_is_read_in_parts_and_refused_in_one_line() -> None:
    assert parse_hub("hub:org/name") == HubDataset(repository="org/name")
    assert parse_hub("hub:a/b:c@refs/x") == HubDataset(repository="a/b", configuration="c", revision="refs/x")
    assert parse_hub("hub:a/b:c@refs/x").name == "hub:a/b:c@refs/x"
    for text in ("hub:name", "hub:", "hub:a/b@", "hub:a/b:@main", "hub:a/b/c"):
        with raises_naming(ConfigError, text, "dataset", "hub:org/name"):
            parse_hub(text)


def test_nothing_of_a_repository_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    files = {"quiz.py": f"open({str(trap)!r}, 'w')\n".encode(), "data/train-00000-of-00001.parquet": QUIZ}
    done = preparation({"org/quiz": {"main": files}}, tmp_path, "--source", "hub:org/quiz", "--target", "out")
    assert done.returncode == 1
    assert not trap.exists()
    assert_names(done.stderr.splitlines()[-1], "cappy preparation: hub:org/quiz@main: ", "from the hub")


def test_a_folder_of_the_repositorys_name_does_not_stand_for_it(tmp_path: Path) -> None:
    (tmp_path / "org" / "quiz").mkdir(parents=True)
    (tmp_path / "org" / "quiz" / "train.jsonl").write_text('{"instruction": "other", "reference": "x"}\n')
    files = {"train.jsonl": b'{"instruction": "q", "reference": "a"}\n'}
    done = preparation({"org/quiz": {"main": files}}, tmp_path, "--source", "hub:org/quiz", "--target", "target")
    assert done.returncode == 1
    assert_names(done.stderr, "folder org/quiz", "another directory")


@pytest.mark.parametrize("name", ["hub:../..", "hub:./a", "hub:a/..", "hub:.a/b"])
def test_a_path_is_no_name_of_a_dataset(name: str) -> None:
    with raises_naming(ConfigError, name, "dataset", "hub:org/name"):
        parse_hub(name)


TRAIN = ("--test", "0", "--validation", "0")


def test_no_picture_of_a_row_is_opened(
    prepared: Callable[..., tuple[Manifest, list[Instance]]], tmp_path: Path
) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.array([{"bytes": None, "path": "/nowhere/picture.png"}])
    table = pa.table({"instruction": ["q"], "reference": ["a"], "picture": picture})
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("instruction", "reference")}
    facts = {"info": {"features": {**features, "picture": {"_type": "Image"}}}}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(facts)}), buffer)
    _, result = prepared(
        {"org/quiz": {"main": {"train.parquet": buffer.getvalue()}}}, "--source", "hub:org/quiz", *TRAIN
    )
    assert [instance.instruction for instance in result] == ["q"]
