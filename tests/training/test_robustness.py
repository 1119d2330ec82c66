"""Nothing is lost: kills, damage, SIGTERM, a loss of NaN, too little memory, input that teaches nothing."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, RobertaConfig, RobertaModel
from waiting import wait_until
from wording import assert_names, raises_naming

from cappy.config import build, encode, to_values
from cappy.errors import CappyError, FolderError, TrainingError
from cappy.progress import silent
from cappy.records import Candidate, Instance, write
from cappy.scoring import Scorer
from cappy.training.checkpoint import Checkpoint, TrainingState, load, newest_update, save
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.pretraining import PretrainingConfig
from cappy.training.pretraining import run as pretraining
from cappy.training.train import train

Plan = Callable[..., FinetuningConfig]


class KilledError(Exception):
    """Stands for a kill at some update."""


class Stop:
    """Progress that raises after some update, and remembers what it was told."""

    def __init__(self, after: int = -1) -> None:
        self.after = after
        self.updates: list[int] = []
        self.notes: set[str] = set()

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = ""
    ) -> None:
        if unit != "updates":
            return
        self.updates.append(done)
        self.notes.add(note)
        if done == self.after:
            raise KilledError


def checkpoints(plan: FinetuningConfig) -> Path:
    (result,) = plan.work.glob("finetuning/*/.checkpoints")
    return result


def weights(plan: FinetuningConfig) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = load_file(plan.target / "model.safetensors")
    return result


def equal(first: FinetuningConfig, second: FinetuningConfig) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def stopped(plan: FinetuningConfig, after: int) -> None:
    with pytest.raises(KilledError):
        run(plan, Stop(after))


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "sums.json", None])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(file: str | None, plan: Plan) -> None:
    run(plan("a"))
    stopped(plan("b"), after=6)
    generations = sorted(checkpoints(plan("b")).iterdir())
    assert [path.name for path in generations] == ["000000005", "000000006"]
    if file is None:
        (generations[-1] / "sums.json").unlink()
    else:
        data = (generations[-1] / file).read_bytes()
        (generations[-1] / file).write_bytes(data[: len(data) // 2])
    actual = Stop()
    run(plan("b"), actual)
    assert actual.updates[0] == 6
    for note in actual.notes:
        assert_names(note, "update 6 is damaged", "from update 5")
    assert equal(plan("a"), plan("b"))


def test_a_run_does_not_start_over_when_every_checkpoint_is_damaged(plan: Plan) -> None:
    stopped(plan(), after=3)
    for generation in checkpoints(plan()).iterdir():
        (generation / "model.safetensors").write_bytes(b"")
    with raises_naming(FolderError, str(checkpoints(plan())), "damaged", "delete this folder"):
        run(plan())


def test_where_no_folder_can_be_renamed_a_killed_run_goes_on_to_the_same_weights(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a bucket that is mounted as a disk."""
    run(plan("a"))
    rename = Path.rename

    def files_alone(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise OSError(errno.EMFILE, "Too many open files")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", files_alone)
    stopped(plan("b"), after=6)
    assert [path.name for path in sorted(checkpoints(plan("b")).iterdir())] == ["000000005", "000000006"]
    (checkpoints(plan("b")) / "000000006/sums.json").unlink()  # A process killed between two files leaves this.
    run(plan("b"))
    assert equal(plan("a"), plan("b"))


def test_a_first_checkpoint_that_was_not_finished_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "000000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    assert load(folder.parent) == (None, "")


DAMAGE = {"sums.json": ["[]", "[" * 100_000, "5", '{"a": 1}'], "state.json": ["[" * 100_000, "[]", '{"no": 1}']}


def saved(folder: Path, update: int) -> Path:
    tensors = {"weight": torch.ones(2)}
    save(folder, Checkpoint(state=TrainingState(update=update), weights=tensors, moments=tensors, best=tensors))
    return folder / f"{update:09d}"


def overwrite(generation: Path, name: str, data: bytes) -> None:
    """Another file, with its sum where it has one."""
    (generation / name).write_bytes(data)
    if name != "sums.json":
        sums = json.loads((generation / "sums.json").read_text())
        sums[name] = hashlib.sha256(data).hexdigest()
        (generation / "sums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_generation_gives_way_to_the_one_before(tmp_path: Path, name: str, text: str) -> None:
    saved(tmp_path, 1)
    overwrite(saved(tmp_path, 2), name, text.encode())
    result, said = load(tmp_path)
    assert result is not None
    assert result.state.update == 1
    assert_names(said, "update 2 is damaged", "from update 1")


def test_tensors_that_are_none_are_a_damaged_checkpoint(tmp_path: Path) -> None:
    overwrite(saved(tmp_path, 1), "model.safetensors", b"\xff" * 100)
    with raises_naming(FolderError, str(tmp_path), "damaged", "delete this folder"):
        load(tmp_path)


def test_a_folder_named_by_other_digits_is_no_generation(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "²").mkdir()
    assert newest_update(tmp_path) == 1


def test_checkpoints_are_written_every_so_many_updates(plan: Plan) -> None:
    stopped(plan(checkpoint_updates=4), after=10)
    assert [path.name for path in sorted(checkpoints(plan()).iterdir())] == ["000000004", "000000008"]
    result, note = load(checkpoints(plan()))
    assert result is not None
    assert (result.state.update, note) == (8, "")


def started(plan: FinetuningConfig, *, threads: str = "1") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "cappy.training", "finetuning", encode(to_values(plan))],
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(plan: FinetuningConfig, process: "subprocess.Popen[str]", update: int) -> None:
    place = f"finetuning/*/.checkpoints/{update:09d}"
    wait_until(lambda: list(plan.work.glob(place)), f"checkpoint {update}", seconds=120, process=process)


def test_a_process_killed_at_any_moment_goes_on_to_the_same_weights(plan: Plan) -> None:
    settings = {"epochs": 4.0, "patience": 10}
    run(plan("a", **settings))
    for update in (3, 17):
        process = started(plan("b", **settings))
        wait_for_checkpoint(plan("b", **settings), process, update)
        process.kill()
        process.communicate()
    run(plan("b", **settings))
    assert equal(plan("a"), plan("b"))


def test_sigterm_writes_a_checkpoint_and_ends_with_one_line(plan: Plan) -> None:
    settings = {"epochs": 200.0, "patience": 100, "checkpoint_updates": 5}
    process = started(plan(**settings))
    wait_for_checkpoint(plan(), process, 5)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - asked < 20
    assert process.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("cappy finetuning: ")
    result, _ = load(checkpoints(plan()))
    assert result is not None
    assert_names(line, f"SIGTERM after update {result.state.update} of", "same command")


class Diverging(Scorer):
    """A scorer whose training passes go wrong as `harm` says."""

    harm: Callable[[Any], Any]

    def training_logits(self, batch: Any) -> torch.Tensor:
        result = super().training_logits(batch)
        return self.harm(result) if self.model.training else result


def train_diverging(plan: FinetuningConfig, harm: Callable[[Any], Any]) -> None:
    """Finetunes a scorer that does `harm` to the logits of every training pass."""

    def start() -> Scorer:
        scorer = Diverging.load(plan.scorer, precision="fp32")
        scorer.harm = harm  # type: ignore[attr-defined]
        return scorer

    train("finetuning", plan, start, parents=(), seen_prompts=np.empty(0, dtype="<u8"), progress=silent)


def after(passes: int, harm: Callable[[Any], Any]) -> Callable[[Any], Any]:
    count = iter(range(10**9))
    return lambda logits: harm(logits) if next(count) >= passes else logits


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda logits: logits * torch.nan, "loss .*nan"),
        (lambda logits: logits * 1e6, r"loss .*\d"),
        (lambda logits: logits + (logits - logits).abs().sqrt() * 1.0, "gradient.* nan"),
    ],
    ids=["nan", "exploded", "gradient"],
)
def test_a_loss_that_is_nothing_to_go_on_with_stops_with_what_one_needs_to_know(
    harm: Callable[[Any], Any], what: str, plan: Plan, instances: list[Instance]
) -> None:
    with pytest.raises(TrainingError, match=rf"^update \d+: .*{what}") as caught:
        train_diverging(plan(batch_tokens=2048), after(5, harm))
    text = str(caught.value)
    update = int(text.split(":")[0].split()[1])
    names = text.split("instances ")[1].split(";")[0].split(", ")
    assert len(names) == 8
    assert set(names) <= {one.instance_id for one in instances if one.split == "train"}
    assert_names(text, f"{checkpoints(plan())}/{update - 1:09d};", "--learning-rate")
    assert "\n" not in text
    result, _ = load(checkpoints(plan()))
    assert result is not None
    assert result.state.update == update - 1
    assert all(tensor.isfinite().all() for tensor in result.weights.values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["gpu", "cpu"])
def test_when_memory_runs_out_the_budget_is_halved_and_the_update_done_again(error: BaseException, plan: Plan) -> None:
    given = {"batch_tokens": 4096, "epochs": 1.0}
    raised: list[int] = []

    def once(logits: Any) -> Any:
        if len(raised) == 0:
            raised.append(1)
            raise error
        return logits

    train_diverging(plan("b", **given), after(3, once))
    log = json.loads((plan("b").target / "training.json").read_text())
    (event,) = log["events"]
    assert_names(event, "update 4:", "memory", "2048 tokens per pass")
    assert sorted(path.name for path in checkpoints(plan("b")).iterdir())[-1] == "000000008", "no update is skipped"


def test_memory_that_is_too_short_for_one_instance_ends_in_one_line(
    plan: Plan,
) -> None:
    def always(logits: Any) -> Any:
        raise MemoryError

    with raises_naming(TrainingError, "memory", "one instance of ", "--max-candidates", "--max-length"):
        train_diverging(plan(), always)


def two(label: float, number: int = 0) -> Instance:
    candidates = tuple(Candidate(response=f"w{i}", labels={"rougeL": label}) for i in range(3))
    return Instance(instance_id=str(number), instruction=f"i {number}", references=("r",), candidates=candidates)


def refused(plan: FinetuningConfig, *names: str) -> None:
    actual = Stop()
    with raises_naming(CappyError, *names) as caught:
        run(plan, actual)
    assert "\n" not in str(caught.value)
    assert actual.updates == [], "refused before training starts"


def test_what_teaches_nothing_is_refused_before_training(plan: Plan, tmp_path: Path) -> None:
    write(tmp_path / "flat", [two(0.5, number) for number in range(4)])
    refused(plan(source=tmp_path / "flat"), "'rougeL'", "0.5", "--metric")
    refused(plan(epochs=0.5, sources=("mismatch",)), str(plan().source), "split train", "source mismatch")


def test_a_budget_smaller_than_a_pair_is_refused(plan: Plan, make_scorer: Callable[..., Path], tmp_path: Path) -> None:
    long = Instance(
        instance_id="long",
        instruction="the cat sat on the mat " * 60,
        references=("r",),
        candidates=(Candidate(response="a", labels={"rougeL": 0.0}), Candidate(response="b", labels={"rougeL": 1.0})),
    )
    write(tmp_path / "long", [long])
    given = plan(source=tmp_path / "long", scorer=str(make_scorer(max_length=200)), batch_tokens=128)
    refused(given, "--batch-tokens 128:", "give --batch-tokens 200")


def test_finetuning_refuses_an_encoder_whose_head_would_be_made_up(
    plan: Plan, scorer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(scorer_folder, tmp_path / "encoder")
    (tmp_path / "encoder" / "manifest.json").unlink()
    path = tmp_path / "encoder" / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "classifier" not in name}, path)
    refused(
        plan(scorer=str(tmp_path / "encoder")),
        str(tmp_path / "encoder"),
        "its weights lack classifier",
        "to train a new head",
    )


def test_pretraining_refuses_an_encoder_without_a_tokenizer(source: Path, scorer_folder: Path, tmp_path: Path) -> None:
    config = RobertaConfig(vocab_size=330, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    RobertaModel(config).save_pretrained(tmp_path / "bare")
    given = {"source": source, "encoder": str(tmp_path / "bare"), "target": tmp_path / "t", "work": tmp_path / "work"}
    with raises_naming(FolderError, str(tmp_path / "bare"), "tokenizer.json", "tokenizer.save_pretrained"):
        pretraining(build(PretrainingConfig, given))
    AutoTokenizer.from_pretrained(scorer_folder).save_pretrained(tmp_path / "bare")
    pretraining(build(PretrainingConfig, {**given, "epochs": 0.2, "max_length": 64, "batch_tokens": 256}))
