"""The plan's arithmetic: rows of the paper's pretraining, operations of shapes, and what devices and assumptions do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names

from cappy.builtin import LLM_FOLDER, TINY_SCORER_FOLDER
from cappy.costing import DEFAULT_THROUGHPUT_PATH, Measurement, PlanConfig, TextLengths, Throughput, read_throughput
from cappy.costing.costs import (
    GENERATORS,
    HARDWARE,
    MAX_SHARDS,
    MAX_VALIDATION_CANDIDATES,
    NUM_VALIDATIONS,
    SCORERS,
    Work,
    cost,
)
from cappy.costing.plan import PretrainingPlan, format_bytes, format_duration, make_plan, text, to_values
from cappy.costing.volumes import mixture_volumes
from cappy.errors import ConfigError
from cappy.preparation.mixtures import load_mixture
from cappy.preparation.mixtures.plan import plan_mixture

PAPER = {"bart0": 5, "t0-3b": 5}
CONFIG = PlanConfig(hardware="h100", gpus=(1,), generators=("bart0", "t0-3b"), mfu=0.4, sampling_mfu=0.1)


@pytest.fixture(scope="module")
def measured() -> Throughput:
    """The measured speeds of this repository."""
    return read_throughput(DEFAULT_THROUGHPUT_PATH)


def planned(measured: Throughput, **changes: Any) -> PretrainingPlan:
    return make_plan(replace(CONFIG, **changes), measured)


def seconds(made: PretrainingPlan, devices: int) -> dict[str, float]:
    return {one.name: one.seconds for one in made.costs(devices)}


def test_the_papers_160_million_rows_come_out_of_the_mixture_and_its_candidates(measured: Throughput) -> None:
    volumes = mixture_volumes("t0", PAPER, measured)
    assert volumes.prompts == 17_277_798
    assert volumes.candidates == 10 * volumes.open_prompts == 100_091_140
    with_choices = plan_mixture(load_mixture("t0")).pairs("choices")
    assert volumes.pairs == with_choices + 12 * volumes.open_prompts == 151_781_384
    assert abs(volumes.pairs / 160e6 - 1) < 0.06  # The authors' count; theirs of wiki_hop's choices is unknown.
    assert volumes.selectable == with_choices + volumes.candidates


def test_every_further_candidate_is_a_row_for_each_open_ended_prompt(measured: Throughput) -> None:
    few, many = (mixture_volumes("t0", {"bart0": number}, measured) for number in (1, 8))
    assert many.pairs - few.pairs == 7 * few.open_prompts
    assert many.pair.tokens == pytest.approx(few.pair.tokens, rel=0.2)


def test_subsets_of_unknown_length_are_as_the_others_of_their_kind(measured: Throughput) -> None:
    def alike(subset: str, kind: Any, tokens: float) -> TextLengths:
        return TextLengths(
            subset=subset, kind=kind, prompts=1, prompt_tokens=tokens, prompt_squared=tokens**2,
            response_tokens=tokens, pair_tokens=tokens, pair_squared=tokens**2,
        )  # fmt: skip

    one = (alike("glue/mrpc", "open-ended", 30.0), alike("glue/mrpc", "choices", 70.0))
    volumes = mixture_volumes("t0", PAPER, replace(measured, texts={**measured.texts, "t0": one}))
    assert (volumes.prompt.tokens, volumes.prompt.squared) == pytest.approx((30, 900))
    share = 12 * volumes.open_prompts / volumes.pairs
    assert volumes.pair.tokens == pytest.approx(share * 30 + (1 - share) * 70)
    assert volumes.measured_share < 0.01
    two = (*one, alike("cnn_dailymail/3.0.0", "open-ended", 130.0))
    volumes = mixture_volumes("t0", PAPER, replace(measured, texts={**measured.texts, "t0": two}))
    mrpc = 2 * 3_668
    assert volumes.prompt.tokens == pytest.approx((mrpc * 30 + 2_584_017 * 130) / (mrpc + 2_584_017))


def test_shapes_have_the_published_numbers_of_weights() -> None:
    def billions(name: str) -> float:
        shape = GENERATORS[name]
        embeddings = shape.vocabulary * shape.hidden  # Beside the head's, which is not tied to them.
        return (shape.encoder_weights + shape.decoder_weights + shape.prompt_weights + embeddings) / 1e9

    assert [round(billions(f"flan-t5-{size}"), 3) for size in ("small", "base", "large")] == [0.077, 0.248, 0.783]
    assert (round(billions("t0-3b"), 2), round(billions("flan-t5-xxl"), 1)) == (2.85, 11.1)
    assert round(SCORERS["roberta-large"].weights / 1e6) == 355


def test_operations_are_counted_as_training_counts_them() -> None:
    from cappy.scoring import Scorer
    from cappy.training.meter import count_layer_weights, pair_flops

    model, shape = Scorer.load(str(TINY_SCORER_FOLDER), precision="fp32").model, SCORERS["builtin"]
    assert shape.layer_weights == count_layer_weights(model)
    expected = sum(pair_flops(model.config, count_layer_weights(model), tokens) for tokens in (10, 250))
    assert 2 * shape.training_flops(130, (10**2 + 250**2) / 2) == pytest.approx(expected)
    assert shape.scoring_flops(9, 81) == pytest.approx(shape.training_flops(9, 81) / 3)


def test_a_generators_matrices_are_all_counted_once() -> None:
    from safetensors.torch import load_file

    tensors = load_file(LLM_FOLDER / "model.safetensors")
    shape = GENERATORS["builtin"]
    attention = {".q.", ".k.", ".v.", ".o."}
    matrices = {
        name: tensor.numel()
        for name, tensor in tensors.items()
        if any(part in name for part in (*attention, ".wi.", ".wo."))
    }
    encoder = sum(number for name, number in matrices.items() if name.startswith("encoder."))
    assert shape.encoder_weights == encoder
    decoder = shape.decoder_weights + shape.prompt_weights - tensors["shared.weight"].numel()
    assert decoder == sum(matrices.values()) - encoder


def test_what_training_does_by_default_is_what_the_plan_counts() -> None:
    from cappy.training.checks import CHECK_CANDIDATES
    from cappy.training.settings import TrainingSettings

    assert MAX_VALIDATION_CANDIDATES == CHECK_CANDIDATES
    assert TrainingSettings(source=Path("a"), target=Path("b")).checks + 1 == NUM_VALIDATIONS


def test_sampling_is_shared_by_as_many_devices_as_there_are_shards_and_no_more(measured: Throughput) -> None:
    made = planned(measured)
    start = next(work.start for work in made.steps if work.step == "sampling")
    one, two, most, beyond = (seconds(made, number)["sampling t0-3b"] - start for number in (1, 2, MAX_SHARDS, 256))
    assert two == pytest.approx(one / 2)
    assert most == pytest.approx(one / MAX_SHARDS)
    assert beyond == most
    hours = [next(c.device_hours for c in made.costs(number) if c.name == "sampling t0-3b") for number in (64, 256)]
    assert hours[0] == hours[1]


def test_training_keeps_its_share_of_linear_speed_and_one_device_keeps_all(measured: Throughput) -> None:
    linear, shared = planned(measured), planned(measured, scaling=0.5)
    assert seconds(linear, 1) == seconds(shared, 1)
    start = next(work.start for work in linear.steps if work.step == "pretraining")
    assert seconds(shared, 8)["pretraining"] - start == pytest.approx(2 * (seconds(linear, 8)["pretraining"] - start))
    assert seconds(shared, 8)["sampling bart0"] == seconds(linear, 8)["sampling bart0"]


def test_devices_that_wait_for_tokens_are_paid_for(measured: Throughput) -> None:
    made = planned(measured)
    one, many = (next(c for c in made.costs(n) if c.name == "pretraining: tokens") for n in (1, 256))
    assert one.seconds == many.seconds
    assert many.device_hours == pytest.approx(256 * one.device_hours)
    priced = replace(made, config=replace(made.config, price=2.0, gpus=(8,)))
    values: Any = to_values(priced)
    costs = values["by_devices"]["8"]
    assert costs["price"] == pytest.approx(2 * sum(c.device_hours for c in made.costs(8)))


def test_twice_the_epochs_are_nearly_twice_the_training_and_nothing_else(measured: Throughput) -> None:
    once, twice = (seconds(planned(measured, epochs=number), 1) for number in (1.0, 2.0))
    changed = {name for name in once if once[name] != twice[name]}
    assert changed == {"pretraining"}
    assert twice["pretraining"] / once["pretraining"] == pytest.approx(2, rel=0.02)


def test_what_nobody_measured_says_so_beside_the_number_in_text_and_json(measured: Throughput) -> None:
    made = planned(measured)
    rows = [line for line in text(made).splitlines() if "not measured: assumes" in line]
    assert [line.split("  ")[0] for line in rows] == ["sampling bart0", "sampling t0-3b", "pretraining", "evaluation"]
    assert_names(rows[2], "assumes 0.4 ", "(--mfu)")
    assert_names(rows[0], "assumes 0.1 ", "(--sampling-mfu)")
    assert "NOT MEASURED on h100" in text(made)
    assert "989 TFLOP/s" in text(made)
    steps = {step["name"]: step for step in json.loads(json.dumps(to_values(made)))["steps"]}
    assert {name for name, step in steps.items() if not step["measured"]} == {line.split("  ")[0] for line in rows}


def test_a_measured_speed_takes_the_place_of_the_assumption(measured: Throughput) -> None:
    entry = Measurement(
        step="pretraining", hardware="h100", subject="roberta-large", unit="FLOP/s", value=5e14, date="2026-12-01",
        machine="one", load=0.0,
    )  # fmt: skip
    known = replace(measured, measurements=(*measured.measurements, entry))
    made = planned(known)
    work = next(one for one in made.steps if one.name == "pretraining")
    assert (work.rate, work.measured) == (5e14, True)
    with pytest.raises(ConfigError, match=r"evaluation of roberta-large .* h100; give --mfu"):
        planned(known, mfu=None)


def test_all_of_a_cpu_is_measured_and_nothing_is_assumed(measured: Throughput) -> None:
    made = make_plan(PlanConfig(hardware="cpu", gpus=(1, 64), generators=("builtin:10",)), measured)
    assert all(work.measured for work in made.steps)
    assert "NOT MEASURED" not in text(made)
    with pytest.raises(ConfigError, match=r"flan-t5-xxl, in FLOP/s, .*\(measured on cpu: .*b"):
        planned(measured, hardware="cpu", generators=("flan-t5-xxl",))


def test_more_cores_shorten_only_what_cores_do(measured: Throughput) -> None:
    few, many = (seconds(planned(measured, workers=number), 4) for number in (1, 100))
    assert {name for name in few if few[name] != many[name]} == {"preparation", "annotation"}
    work = Work(
        step="annotation", name="a", amount=100.0, unit="pairs", rate=10.0, start=1.0, basis="", measured=True,
        processors="cores",
    )  # fmt: skip
    assert cost(work, 7, CONFIG, cores=5).seconds == pytest.approx(3.0)


def test_every_gpu_has_a_name_that_a_command_line_can_take() -> None:
    assert {"cpu", "h100", "h100-pcie", "a100", "l4"} < set(HARDWARE)
    assert all(name == name.lower() and " " not in name for name in HARDWARE)


def test_times_and_sizes_are_said_in_one_unit() -> None:
    assert [format_duration(one) for one in (8, 119, 600, 10_800, 400_000, 1e9)] == [
        "8.0 s", "119 s", "10 min", "3.0 h", "4.6 d", "31.7 years",
    ]  # fmt: skip
    assert [format_bytes(one) for one in (0, 1_500, 2.5e6, 3e9, 4.2e12)] == ["", "1.5 kB", "2.5 MB", "3 GB", "4.2 TB"]
