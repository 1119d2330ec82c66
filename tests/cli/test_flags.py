"""Flags from a config class, and a step verb made of them, without a process."""

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from wording import assert_names, raises_naming

from cappy.cli import main
from cappy.cli.flags import flag_type, parameters
from cappy.cli.steps import make_step_command, summary
from cappy.config import DEFAULT_WORK, Fresh, Location, Work, settings
from cappy.errors import ConfigError
from cappy.progress import Progress
from cappy.records import File, Manifest
from cappy.steps import STEP_SPECS
from cappy.worker import config_class


@settings
class BrewingConfig:
    """Settings of every kind."""

    source: Annotated[Location, Field(description="Folder of beans")]
    target: Annotated[Location, Field(description="Folder of cups")]
    bean: Annotated[tuple[str, ...], Field(description="Bean to grind")] = ()
    kind: Annotated[Literal["filter", "espresso"], Field(description="How it is brewed")] = "filter"
    grams: Annotated[int, Field(ge=5, le=30, description="Coffee in grams")] = 15
    bar: Annotated[float | None, Field(gt=0, description="Pressure in bar; left out: none is applied")] = None
    milk: Annotated[bool, Field(description="Whether milk goes in")] = True
    label: Annotated[str, Field(description="Label [of the cup]")] = ""
    strength: Annotated[int | Literal["auto"], Field(description="Strength, or auto")] = "auto"
    times: Annotated[tuple[float, ...], Field(description="Minutes of each pour")] = (0.5, 1.0)
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""


class Brewed:
    """Records the configs it is run with."""

    def __init__(self) -> None:
        self.configs: list[BrewingConfig] = []

    def __call__(self, config: BrewingConfig, progress: Progress) -> Manifest:
        self.configs.append(config)
        progress(1, 2, unit="cups")
        files = (File(name="part-00000.parquet", sha256="0", rows=1200, candidates=2400),)
        return Manifest(step="brewing", files=files, metrics={"instances": 1200.0, "warmth": 0.25})


def run(brewed: Brewed, *words: str) -> int:
    command = make_step_command("brewing", "Brew coffee.", BrewingConfig, brewed)
    with pytest.raises(SystemExit) as ended:
        command(list(words), prog_name="cappy brewing")
    return int(ended.value.code or 0)


def test_flags_left_out_take_the_defaults_of_the_class() -> None:
    brewed = Brewed()
    assert run(brewed, "--source", "a", "--target", "b") == 0
    assert brewed.configs == [BrewingConfig(source=Path("a"), target=Path("b"))]


def test_every_kind_of_flag_reaches_its_field_with_its_type() -> None:
    brewed = Brewed()
    words = "--source a --target b --bean x --bean y --kind espresso --grams 7 --bar 9.5 --no-milk --label = "
    assert run(brewed, *words.split(), "--strength", "3", "--times", "2", "--times", "3.5") == 0
    expected = BrewingConfig(
        source=Path("a"),
        target=Path("b"),
        bean=("x", "y"),
        kind="espresso",
        grams=7,
        bar=9.5,
        milk=False,
        label="=",
        strength=3,
        times=(2.0, 3.5),
    )
    assert brewed.configs == [expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--target b", "Missing option '--source'"),
        ("--source a --target b --grams 4", "'--grams'"),
        ("--source a --target b --grams 31", "'--grams'"),
        ("--source a --target b --grams much", "'--grams'"),
        ("--source a --target b --kind cold", "'--kind'"),
        ("--source a --target b --gram 7", "No such option: --gram"),
        ("--source a --target b left", "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_status_2_and_nothing_runs(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    brewed = Brewed()
    assert run(brewed, *words.split()) == 2
    assert message in capsys.readouterr().err
    assert brewed.configs == []


def test_what_typer_cannot_check_the_class_refuses_before_anything_runs() -> None:
    brewed = Brewed()
    command = make_step_command("brewing", "Brew coffee.", BrewingConfig, brewed)
    with raises_naming(ConfigError, "brewing: --bar: ", "greater than 0", "-1.0"):
        command(["--source", "a", "--target", "b", "--bar", "-1"])
    assert brewed.configs == []


def test_help_says_of_every_flag_what_it_is_its_range_and_its_default(
    capsys: pytest.CaptureFixture[str], flag_rows: Callable[[str], dict[str, str]]
) -> None:
    assert run(Brewed(), "--help") == 0
    rows = flag_rows(capsys.readouterr().out)
    expected = {
        "--source": ["Folder of beans", "[required]"],
        "--bean": ["Bean to grind (repeatable)", "[default: (none)]"],
        "--kind": ["filter|espresso", "How it is brewed", "[default: filter]"],
        "--grams": ["Coffee in grams", "[default: 15; 5<=x<=30]"],
        "--bar": ["Pressure in bar; left out: none is applied; must be above 0"],
        "--milk": ["--no-milk", "Whether milk goes in", "[default: milk]"],
        "--label": ["Label [of the cup]", "[default: (none)]"],
        "--strength": ["Strength, or auto", "[default: auto]"],
        "--times": ["Minutes of each pour (repeatable)", "[default: 0.5, 1.0]"],
    }
    assert set(rows) == {*expected, "--target", "--work", "--fresh", "--json", "--help"}
    for flag, texts in expected.items():
        for text in texts:
            assert text in rows[flag]


def test_json_prints_the_manifest_and_else_one_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run(Brewed(), "--source", "a", "--target", "b", "--json")
    manifest = Manifest.from_json(capsys.readouterr().out)
    assert (manifest.step, manifest.rows) == ("brewing", 1200)
    run(Brewed(), "--source", "a", "--target", "b")
    line = capsys.readouterr().out
    assert line.startswith("b: ")
    assert_names(line, "1,200 instances", "2,400 candidates", "warmth 0.25", manifest.hash[:12])
    assert line.count("\n") == 1


def test_a_folder_without_instances_is_counted_in_files() -> None:
    manifest = Manifest(step="x", files=(File(name="a", sha256="0"), File(name="b", sha256="0")))
    assert_names(summary(manifest, Path("there"), 2.0), "there: ", "2 files", manifest.hash[:12], "2.0 s")


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Annotated[int, "x"], int),
        (int | None, int | None),
        (tuple[Literal["a", "b"], ...], list[str]),
        (tuple[Path, ...], list[Path]),
        (dict[str, int], str),
    ],
)
def test_types_that_typer_does_not_know_are_read_as_text(annotation: Any, expected: Any) -> None:
    assert flag_type(annotation) == expected


@pytest.mark.parametrize(
    ("step", "old", "new"),
    [
        ("sampling", "--retries", "--max-retries"),
        ("sampling", "--budget-requests", "--max-total-requests"),
        ("sampling", "--budget-tokens", "--max-total-tokens"),
        ("sampling", "--budget-money", "--max-total-cost"),
        ("annotation", "--recipe", "--preset"),
        ("annotation", "--report", "--data-report"),
        ("pretraining", "--strategy", "--parallelism"),
        ("finetuning", "--retries", "--max-restarts"),
        ("finetuning", "--volume", "--trainjob.volume or --customjob.volume"),
        ("deployment", "--gpus", "--kserve.gpus"),
        ("deployment", "--machine", "--vertex.machine"),
        ("threshold", "--precision", "--min-precision"),
        ("plan", "--calibration", "--throughput"),
    ],
)
def test_a_flag_of_an_earlier_release_is_refused_with_its_name_now(
    capsys: pytest.CaptureFixture[str], step: str, old: str, new: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([step, f"{old}=1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"cappy {step}: {old} is now {new}\n"


def test_no_flag_means_two_things() -> None:
    """Of flags with one name, the values are of one type, and they choose of the same words; but for folders' roles."""
    seen: dict[str, dict[object, list[str]]] = {}
    for step in STEP_SPECS:
        for flag in parameters(config_class(step)):
            kind = typing.get_args(flag.annotation)[0]
            seen.setdefault(flag.name, {}).setdefault(kind, []).append(step)
    several = {name for name, kinds in seen.items() if len(kinds) > 1}
    # A source or a scorer may be a folder alone; a dataset of the hub has splits of any name.
    assert several <= {"source", "scorer", "split"}, {name: seen[name] for name in several}
