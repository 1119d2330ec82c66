"""What a person sees of training: figures while it runs, curves afterwards, a trial before."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from wording import assert_names

from cappy.cli import main
from cappy.config import to_values
from cappy.records import Instance, write
from cappy.scoring.model import keep_heads_in_fp32
from cappy.scoring.scorer import Scorer
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.meter import Meter, count_layer_weights, describe_progress, pair_flops, peak_flops, read_curves
from cappy.training.update import learning_rate

Plan = Callable[..., FinetuningConfig]


def test_figures_are_means_over_recent_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(peak=1000.0)
    assert meter.figures() == {}
    for pairs in (10, 30):
        with meter.time_update():
            pass
        meter.add(pairs=pairs, tokens=5 * pairs, padded_tokens=8 * pairs, flops=20.0 * pairs)
    assert meter.figures() == {
        "pairs_per_second": 10.0,
        "tokens_per_second": 50.0,
        "padding_share": 0.375,
        "mfu": 0.2,
    }
    line = describe_progress(0.25, 1e-4, meter.figures())
    assert_names(line, "loss 0.2500", "rate 0.0001", "10 pairs/s", "50 tokens/s", "38% padding", "MFU 20%")
    assert peak_flops(torch.device("cpu"), 2, bf16=True) is None


def test_flops_are_those_that_torch_counts(scorer_folder: Path) -> None:
    """The head is left aside."""
    from torch.utils.flop_counter import FlopCounterMode

    scorer = Scorer.load(str(scorer_folder), precision="fp32")
    (pair,) = scorer.encoder.encode([("one two three four five six", "cat dog bird")])
    ids = torch.tensor([pair.ids])
    scorer.model.set_attn_implementation("eager")  # The counter does not know the fused kernel of a CPU.
    with FlopCounterMode(display=False) as counter:
        scorer.model(input_ids=ids).logits.sum().backward()
    head = sum(w.numel() for n, w in scorer.model.named_parameters() if "classifier" in n and w.ndim == 2)
    expected = counter.get_total_flops() - 6 * head
    result = pair_flops(scorer.model.config, count_layer_weights(scorer.model), len(pair.ids))
    assert result == pytest.approx(expected, rel=1e-3)


def test_curves_tell_loss_rate_picks_and_speed_and_a_resumed_run_keeps_them(plan: Plan) -> None:
    notes: list[str] = []
    tokenized: list[tuple[int, int | None]] = []

    class KilledError(Exception):
        pass

    def killed(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        if unit == "updates":
            notes.append(note)
        else:
            tokenized.append((done, total))
        if done == 5:
            raise KilledError

    with pytest.raises(KilledError):
        run(plan(), killed)
    manifest = run(plan())
    points = read_curves(plan().target, plan().work, manifest.hash)
    updates = int(manifest.metrics["updates"])
    rates = [point["rate"] for point in points if "rate" in point]
    assert rates == [learning_rate(update, updates, 1e-3, plan().warmup) for update in range(updates)]
    assert [point["update"] for point in points if "pairs_per_second" in point] == list(range(1, updates + 1))
    assert sum("pick" in point for point in points) >= 3
    assert all(point["padding_share"] == 0 for point in points if "padding_share" in point)
    assert tokenized == [(80, None)], "train and validation instances, once"
    assert_names(notes[0], "loss ", "pairs/s", "0% padding")
    assert "pairs_per_second" not in (plan().target / "training.json").read_text()


def test_a_dry_run_measures_and_writes_nothing(plan: Plan) -> None:
    manifest = run(plan(dry_run=True, epochs=40.0))
    result = manifest.metrics
    assert result["trial_updates"] == 20
    assert result["updates"] == 300
    checking = 20 * 4 * 4 / 3 / result["pairs_per_second"]
    assert result["projected_seconds"] == pytest.approx(300 * result["seconds_per_update"] + checking, rel=0.01)
    assert result["seconds_per_update"] == pytest.approx(8 * 4 / result["pairs_per_second"], rel=0.2)
    assert result["peak_bytes"] > 50e6
    assert not plan().target.exists()
    assert sorted(path.name for path in plan().work.iterdir()) == ["tokens"]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_dry_run_says_what_the_whole_run_takes(
    plan: Plan, devices: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = plan()
    flags = ["--source", settings.source, "--scorer", settings.scorer, "--target", settings.target]
    flags += ["--work", settings.work, "--epochs", 40, "--batch-instances", 8, "--devices", devices, "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        main(["finetuning", *map(str, flags)])
    text = capsys.readouterr().out
    assert not ended.value.code
    assert text.startswith("20 updates of 300: ")
    assert_names(text, "the whole run")
    assert not settings.target.exists()


def test_bf16_is_asked_for_by_flag_and_changes_the_products_alone(plan: Plan) -> None:
    losses = []
    for name, precision in (("a", "fp32"), ("b", "bf16")):
        settings = plan(name, precision=precision, epochs=0.5)
        run(settings)
        losses.append([point["loss"] for point in json.loads((settings.target / "training.json").read_text())["curve"]])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_in_bf16_the_head_and_what_follows_stay_in_fp32(scorer_folder: Path) -> None:
    scorer = Scorer.load(str(scorer_folder), precision="fp32")
    batch = scorer.encoder.encode([("one two three", "cat"), ("four", "dog bird")])
    exact = scorer.training_logits(batch)
    scorer.autocast = True
    keep_heads_in_fp32(scorer.model)
    for pads in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scorer, "pads", pads)
            result = scorer.training_logits(batch)
        assert result.dtype == torch.float32
        assert (result != result.bfloat16().float()).any(), "a head in bf16 would have rounded them"
        assert 0 < (result - exact).abs().max() < 0.05
        assert all(weight.dtype == torch.float32 for weight in scorer.model.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_padding_is_reported_where_there_is_some(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "pads", True)
    manifest = run(plan(epochs=0.5))
    shares = [
        p["padding_share"] for p in read_curves(plan().target, plan().work, manifest.hash) if "padding_share" in p
    ]
    assert shares
    assert all(0 < share < 0.5 for share in shares)


def test_without_validation_instances_no_pick_is_reported(
    plan: Plan, instances: list[Instance], tmp_path: Path
) -> None:
    write(tmp_path / "train-only", [one for one in instances if one.split == "train"])
    manifest = run(plan(source=tmp_path / "train-only", epochs=0.5))
    assert "validation_pick" not in manifest.metrics
    assert not any("pick" in point for point in read_curves(plan().target, plan().work, manifest.hash))


def test_a_dry_run_that_another_launcher_starts_is_reported_too(plan: Plan) -> None:
    settings = json.dumps(to_values(plan(dry_run=True)))
    command = [sys.executable, "-m", "cappy.training", "finetuning", settings]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("15 updates of 15: ")


def test_peaks_are_detected_by_whole_words() -> None:
    names = {"NVIDIA L40": 1.81e14, "NVIDIA L4": 1.21e14, "NVIDIA L40S": 3.62e14, "NVIDIA H100 80GB HBM3": 9.89e14}
    names |= {"NVIDIA H100 NVL": 8.35e14, "NVIDIA H200": 9.89e14, "NVIDIA A100-SXM4-80GB": 3.12e14}
    for name, peak in names.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
            assert peak_flops(torch.device("cuda"), 2, bf16=True) == 2 * peak


@pytest.mark.parametrize("counted", [1, 7, 2**16])
def test_a4_cut_pairs_are_counted_and_said_once(
    counted: int,
    tmp_path: Path,
    make_scorer: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from cappy.records import Candidate

    monkeypatch.setattr("cappy.training.corpus.COUNT_CHUNK", counted)
    instances = [
        Instance(
            instance_id=str(number),
            instruction="cat " * (60 if number % 3 == 0 else 2) + str(number),
            references=("r",),
            split="validation" if number % 4 == 3 else "train",
            candidates=tuple(
                Candidate(response=text, labels={"rougeL": float(text == "cat")})
                for text in ("cat", "dog", "bird " * (40 if number % 5 == 0 else 1))
            ),
        )
        for number in range(20)
    ]
    write(tmp_path / "annotated", instances)
    folder = make_scorer(seed=51)
    scorer = Scorer.load(str(folder), precision="fp32")
    pairs = [(one.instruction, candidate.response) for one in instances for candidate in one.candidates]
    expected = sum(not whole for whole in scorer.encoder.fits(pairs))
    assert 0 < expected < len(pairs)
    config = FinetuningConfig(
        source=tmp_path / "annotated",
        target=tmp_path / "scorer",
        work=tmp_path / "work",
        scorer=str(folder),
        epochs=0.1,
    )
    assert run(config).metrics["cut_pairs"] == expected
    (said,) = [one.message for one in caplog.records if "pairs are longer" in one.message]
    assert_names(said, f"{expected} of {len(pairs)} pairs", "48 tokens")
