"""`cappy plan`: what it prints, and that what a person can mend is one line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy.plan.calibration import DEFAULT

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
    found = json.loads(here(*words).stdout)
    assert found["volumes"]["samples"] == {"flan-t5-xl": 7}
    assert found["terms"]["mfu"] == 0.4
    assert "price" not in found["by_devices"]["4"]
    assert json.loads(here(*words, "--price", "0.5").stdout)["by_devices"]["4"]["price"] == pytest.approx(
        0.5 * found["by_devices"]["4"]["device_hours"]
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--mixture", "t1", "--hardware", "h100"), "--mixture: nothing is pretrained on 't1'; choose t0"),
        (("--mixture", "heldout", "--hardware", "h100"), "--mixture: nothing is pretrained on 'heldout'; choose t0"),
        (("--hardware", "h101"), "--hardware: no hardware 'h101'; choose of cpu, b200,"),
        (("--hardware", "h100", "--generators", "flan-t5-huge"), "--generators: no shape 'flan-t5-huge'; choose of"),
        (("--hardware", "h100", "--generators", "bart0:0"), "'bart0:0' is no NAME or NAME:NUMBER; write as bart0:5"),
        (("--hardware", "h100", "--generators", "bart0", "--generators", "bart0:2"), "'bart0' stands twice; give"),
        (("--hardware", "h100", "--scorer", "bert"), "--scorer: no shape 'bert'; choose of builtin, mini,"),
        (("--hardware", "h100", "--gpus", "0", *ASSUMED), "--gpus: 0 is out of range; give 1 to 256"),
        (("--hardware", "h100", "--gpus", "1", "--gpus", "300", *ASSUMED), "--gpus: 300 is out of range; give 1 to"),
        (("--hardware", "h100"), "sampling of bart0 was never measured on h100; give --sampling-mfu, the share"),
        (("--hardware", "h100", "--price", "inf"), "--price: inf is no number to reckon with; give a finite one"),
        (("--hardware", "h100", "--epochs", "inf"), "--epochs: inf is no number to reckon with"),
        (("--hardware", "h100", "--mfu", "0"), "--mfu: 0 is no share of a peak; give one above 0 and at most 1"),
        (("--hardware", "h100", "--sampling-mfu", "40"), "--sampling-mfu: 40 is no share of a peak; give one above"),
        (("--hardware", "h100", "--calibration", "no.json"), "no.json: no such calibration; write it with python"),
    ],
)
def test_what_a_person_can_mend_is_one_line(here: Cappy, words: tuple[str, ...], told: str) -> None:
    done = here("plan", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cappy plan: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text[: len(text) // 2], "is no calibration (file: Invalid JSON"),
        (lambda text: text.replace('"benchmark": "calibration"', '"benchmark": "training"'), "(benchmark: Input"),
        (lambda text: text.replace('"pairs/s"', '"pears/s"', 1), "is no calibration (measurements."),
        (lambda text: text.replace('"value": ', '"value": -', 1), "write it with python benchmarks/calibration.py"),
        (lambda text: text.replace('"heldout"', '"held"'), "has no lengths of the texts of heldout; write it"),
        (lambda text: text.replace('"step": "tokenization"', '"step": "evaluation"'), "tokenization of t0, in bytes"),
    ],
)
def test_a_damaged_calibration_is_named_with_the_remedy(
    here: Cappy, tmp_path: Path, change: Callable[[str], str], told: str
) -> None:
    path = tmp_path / "measured.json"
    path.write_text(change(DEFAULT.read_text()))
    done = here("plan", "--hardware", "h100", "--calibration", path, *ASSUMED)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
