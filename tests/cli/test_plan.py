"""`cappy plan`: what it prints, and that what a person can mend is one line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from wording import assert_names

from cappy.costing import DEFAULT_THROUGHPUT_PATH

Cappy = Callable[..., subprocess.CompletedProcess[str]]
ASSUMED = ("--mfu", "0.4", "--sampling-mfu", "0.1")


def test_a_plan_has_a_row_for_each_step_and_a_column_for_each_number_of_gpus(here: Cappy) -> None:
    done = here("plan", "--mixture", "t0", "--hardware", "h100", "--gpus", "1", "--gpus", "256", *ASSUMED)
    assert (done.returncode, done.stderr) == (0, "")
    assert "151,781,384 pairs" in done.stdout
    times = done.stdout.split("wall-clock")[1]
    assert "1 GPU" in times
    assert "256 GPUs" in times
    for row in ("preparation", "sampling bart0", "annotation", "pretraining", "evaluation", "total", "GPU-hours"):
        assert f"\n{row} " in times
    assert "price" not in times


def test_json_says_the_same_with_numbers_and_a_price_only_where_one_is_given(here: Cappy) -> None:
    words = ("plan", "--generators", "flan-t5-xl:7", "--hardware", "l4", "--gpus", "4", *ASSUMED, "--json")
    result = json.loads(here(*words).stdout)
    assert result["volumes"]["samples"] == {"flan-t5-xl": 7}
    assert result["terms"]["mfu"] == 0.4
    assert "price" not in result["by_devices"]["4"]
    assert json.loads(here(*words, "--price", "0.5").stdout)["by_devices"]["4"]["price"] == pytest.approx(
        0.5 * result["by_devices"]["4"]["device_hours"]
    )


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--mixture", "t1", "--hardware", "h100"), ("--mixture", "'t1'", "t0")),
        (("--mixture", "heldout", "--hardware", "h100"), ("--mixture", "'heldout'", "t0")),
        (("--hardware", "h101"), ("--hardware", "'h101'", "cpu, b200,")),
        (("--hardware", "h100", "--generators", "flan-t5-huge"), ("--generators", "'flan-t5-huge'", "flan-t5-xl")),
        (("--hardware", "h100", "--generators", "bart0:0"), ("'bart0:0'", "bart0:5")),
        (("--hardware", "h100", "--generators", "bart0", "--generators", "bart0:2"), ("'bart0'", "twice")),
        (("--hardware", "h100", "--scorer", "bert"), ("--scorer", "'bert'", "builtin, mini,")),
        (("--hardware", "h100", "--gpus", "0", *ASSUMED), ("--gpus: 0 ", "1 to 256")),
        (("--hardware", "h100", "--gpus", "1", "--gpus", "300", *ASSUMED), ("--gpus: 300 ", "1 to 256")),
        (("--hardware", "h100"), ("bart0", "h100", "--sampling-mfu")),
        (("--hardware", "h100", "--price", "inf"), ("--price: ", "finite", "got inf")),
        (("--hardware", "h100", "--epochs", "inf"), ("--epochs: ", "finite", "got inf")),
        (("--hardware", "h100", "--mfu", "0"), ("--mfu: ", "got 0", "above 0 and at most 1")),
        (("--hardware", "h100", "--sampling-mfu", "40"), ("--sampling-mfu: ", "got 40", "above 0 and at most 1")),
        (("--hardware", "h100", "--throughput", "no.json"), ("no.json", "python benchmarks/throughput.py")),
    ],
)
def test_what_a_person_can_mend_is_one_line(here: Cappy, words: tuple[str, ...], names: tuple[str, ...]) -> None:
    done = here("plan", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cappy plan: ")
    assert done.stderr.count("\n") == 1
    assert_names(done.stderr, *names)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: text.replace('"benchmark": "throughput"', '"benchmark": "training"'), "(benchmark: "),
        (lambda text: text.replace('"pairs/s"', '"pears/s"', 1), "(measurements."),
        (lambda text: text.replace('"value": ', '"value": -', 1), "annotation of builtin is -"),
        (lambda text: text.replace('"heldout"', '"held"'), "heldout"),
        (lambda text: text.replace('"step": "tokenization"', '"step": "evaluation"'), "tokenization of t0, in bytes"),
    ],
)
def test_a_damaged_file_of_speeds_is_named_with_the_remedy(
    here: Cappy, tmp_path: Path, change: Callable[[str], str], named: str
) -> None:
    path = tmp_path / "measured.json"
    path.write_text(change(DEFAULT_THROUGHPUT_PATH.read_text()))
    done = here("plan", "--hardware", "h100", "--throughput", path, *ASSUMED)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert_names(done.stderr, named, "python benchmarks/throughput.py")
