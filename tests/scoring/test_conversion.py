"""A published checkpoint becomes a scorer folder whose scores are the checkpoint's own, or nothing comes about."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from cappy.errors import CappyError, ConfigError, FolderError
from cappy.scoring import Scorer
from cappy.scoring.conversion import convert

PAIRS = [("where is the cat", "on the mat"), ("a", "blue bird two three"), ("who sat in the tree", "no")]


@pytest.fixture
def published(make_scorer: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder as the published one: weights as .bin, a configuration that states no head, the tokenizer's files."""
    folder = tmp_path / "published"
    shutil.copytree(make_scorer(head="mse", seed=8), folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "manifest.json").unlink()
    state["roberta.embeddings.position_ids"] = torch.arange(50)[None]
    torch.save(state, folder / "pytorch_model.bin")
    edit(folder, cappy=None, sentence_transformers=None, problem_type=None)
    return folder


def edit(folder: Path, **values: Any) -> None:
    """Sets fields of config.json, or takes them out (None)."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def hash_of(folder: Path) -> str:
    return sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Puts what `change` makes of the state dict in its place."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(change(state), folder / "pytorch_model.bin")


def refused(folder: Path, message: str, kind: type[CappyError] = FolderError) -> None:
    """The folder is refused in one line with `message`, and nothing is left behind."""
    target = folder.parent / "out/scorer"
    with pytest.raises(kind, match=message) as caught:
        convert(str(folder), target, sha256=hash_of(folder))
    assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_scores_after_conversion_are_the_checkpoints_own_logits(published: Path, tmp_path: Path) -> None:
    target = tmp_path / "out/scorer"
    manifest = convert(str(published), target, sha256=hash_of(published).upper())
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(published)).eval()
    state = torch.load(published / "pytorch_model.bin", weights_only=True)
    model.load_state_dict({name: value for name, value in state.items() if "position_ids" not in name})
    tokenizer = AutoTokenizer.from_pretrained(published)
    with torch.no_grad():
        logits = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in PAIRS]
    scorer = Scorer.load(str(target), precision="fp32")
    assert scorer.score(PAIRS) == pytest.approx(logits, abs=1e-5)
    assert max(logits) - min(logits) > 0.01
    assert (scorer.head, scorer.version) == ("mse", manifest.hash[:12])
    assert json.loads((target / "config.json").read_text())["cappy"]["head"] == "mse"
    assert manifest.facts["weights_sha256"] == hash_of(published)
    assert not list(target.glob("*.bin"))
    assert [path.name for path in target.parent.iterdir()] == ["scorer"]


def test_weights_in_half_precision_are_written_in_fp32(published: Path, tmp_path: Path) -> None:
    rewrite(published, lambda state: {name: value.half() for name, value in state.items()})
    convert(str(published), tmp_path / "scorer", sha256=hash_of(published))
    assert {tensor.dtype for tensor in load_file(tmp_path / "scorer/model.safetensors").values()} == {torch.float32}


def test_a_file_with_another_hash_is_not_read_and_the_detected_hash_is_reported(
    published: Path, tmp_path: Path
) -> None:
    (published / "pytorch_model.bin").write_bytes(b"never parsed")
    with pytest.raises(FolderError, match=f"{hash_of(published)}.*{'0' * 64}.*--sha256"):
        convert(str(published), tmp_path / "scorer", sha256="0" * 64)
    with pytest.raises(ConfigError, match="--sha256: .*64.*'main'"):
        convert(str(published), tmp_path / "scorer", sha256="main")


def test_a_target_that_holds_something_is_kept(published: Path, tmp_path: Path) -> None:
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer/mine").write_text("kept")
    with pytest.raises(FolderError, match="exists.*--target"):
        convert(str(published), tmp_path / "scorer", sha256=hash_of(published))
    assert (tmp_path / "scorer/mine").read_text() == "kept"


def test_a_key_missing_too_many_or_of_another_shape_is_refused(published: Path) -> None:
    original = (published / "pytorch_model.bin").read_bytes()
    rewrite(published, lambda state: {name: value for name, value in state.items() if "classifier" not in name})
    refused(published, r"lacks classifier\.dense\.bias, .* 1 more")
    (published / "pytorch_model.bin").write_bytes(original)
    rewrite(published, lambda state: {**state, "lm_head.bias": torch.zeros(3)})
    refused(published, r"has lm_head\.bias.*config\.json")
    (published / "pytorch_model.bin").write_bytes(original)
    rewrite(published, lambda state: {**state, "classifier.out_proj.bias": torch.zeros(3)})
    refused(published, r"classifier\.out_proj\.bias .*\(3,\).*\(1,\).*config\.json")


def test_an_encoder_without_a_scoring_head_is_refused(published: Path) -> None:
    edit(published, architectures=["RobertaForMaskedLM"])
    refused(published, "RobertaForMaskedLM.*cappy pretraining")


def test_another_architecture_or_number_of_labels_is_refused(published: Path) -> None:
    config = (published / "config.json").read_text()
    edit(published, model_type="bert", architectures=["BertForSequenceClassification"])
    refused(published, r"lacks bert\.embeddings")
    (published / "config.json").write_text(config)
    edit(published, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    refused(published, "2 labels")
    edit(published, model_type="unheard", id2label=None, label2id=None)
    refused(published, r"config.json")


def test_without_tokenizer_or_with_a_foreign_one_it_is_refused(published: Path) -> None:
    tokenizer = (published / "tokenizer.json").read_bytes()
    (published / "tokenizer.json").unlink()
    refused(published, "no tokenizer")
    (published / "vocab.json").write_text("{}")
    refused(published, "no tokenizer")
    (published / "tokenizer.json").write_text("{")
    refused(published, r"tokenizer")
    (published / "tokenizer.json").write_bytes(tokenizer)
    rewrite(
        published,
        lambda s: {**s, "roberta.embeddings.word_embeddings.weight": torch.zeros(200, 32)},
    )
    edit(published, vocab_size=200)
    refused(published, "tokenizer.* 200")


@pytest.mark.parametrize("content", [b"", b"text, no checkpoint", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint_is_refused(published: Path, content: bytes) -> None:
    (published / "pytorch_model.bin").write_bytes(content)
    refused(published, "pytorch_model.bin: .*tensors only")


class Evil:
    """Runs when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_file_that_would_run_code_is_refused_and_runs_none(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(published, lambda state: {**state, "evil": Evil()})
    refused(published, "pytorch_model.bin: .*tensors only")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_state_dict_is_refused(published: Path) -> None:
    rewrite(published, lambda state: {"state_dict": state, "epoch": 3})
    refused(published, "state dict")
    rewrite(published, lambda state: list(state.values()))
    refused(published, "state dict")


def test_a_source_without_a_checkpoint_says_what_it_lacks(
    published: Path, make_scorer: Callable[..., Path], tmp_path: Path
) -> None:
    ours = make_scorer(seed=9)
    for source, message in (
        (str(ours), "pytorch_model.bin.*safetensors"),
        (str(tmp_path / "absent"), "no such folder"),
        ("models:/cappy@champion", "--source.*pytorch_model.bin.*hub:"),
    ):
        with pytest.raises((ConfigError, FolderError), match=message):
            convert(source, tmp_path / "scorer", sha256="0" * 64)
    (published / "config.json").unlink()
    refused(published, "no config.json")
