"""Finetuning from an encoder: a new head is made and named; the head of a scorer is never replaced in silence."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import FAMILIES, family_config, save_encoder, word_tokenizer
from other_loaders import by_cross_encoder, by_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from wording import raises_naming

from cappy.config import build
from cappy.errors import FolderError
from cappy.records.folder import read_manifest
from cappy.scoring import Scorer
from cappy.training import pretraining
from cappy.training.finetuning import FinetuningConfig, run

Plan = Callable[..., FinetuningConfig]
PAIRS = [("one cat dog mat", "mat"), ("two bird red", "blue"), ("the a b", "three one")]


def edit(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; None removes a key."""
    old = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**old, **values}.items() if value is not None}))


def drop(folder: Path, *prefixes: str) -> None:
    """Removes tensors from the weights of a folder."""
    path = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not name.startswith(prefixes)}, path)


def classifier(folder: Path, *, labels: int = 1, kind: Any = AutoModelForSequenceClassification) -> Path:
    """A random RoBERTa with a head, as another tool would write it."""
    torch.manual_seed(3)
    kind.from_config(family_config("roberta", num_labels=labels)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("masked_lm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_has_one_number_everywhere(
    family: str, masked_lm: bool, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = save_encoder(family, tmp_path / "encoder", masked_lm=masked_lm)
    config = plan(scorer=str(encoder), epochs=0.3, checks=1)
    manifest = run(config)
    assert manifest.facts["new_head"] == "bce"
    assert manifest.config["scorer"] == str(encoder)
    assert [one.message for one in caplog.records if "new head" in one.message] == [
        f"{encoder} is an encoder: a new head is made"
    ]
    scorer = Scorer.load(str(config.target), precision="fp32")
    assert scorer.head == "bce"
    # MPNet's first position is the third, RoBERTa's follows the padding id, DeBERTa and ModernBERT have no table.
    assert scorer.encoder.max_length == (62 if family in ("roberta", "xlm-roberta", "mpnet") else 64)
    scores = scorer.score(PAIRS)
    assert max(scores) - min(scores) > 1e-3
    assert by_transformers(config.target, PAIRS) == pytest.approx(scores, abs=1e-4)
    assert by_cross_encoder(config.target, PAIRS) == pytest.approx(scores, abs=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, config.target))
    moved = [
        float((value - after[full]).abs().max())
        for name, value in before.items()
        for full in after
        if full.endswith(name) and "layer" in name and value.ndim == 2
    ]
    assert len(moved) >= 3
    assert 0 < max(moved) < 0.05, "training starts from the weights of the encoder"


def test_the_new_head_depends_on_the_seed_alone(plan: Plan, tmp_path: Path) -> None:
    encoder = save_encoder("bert", tmp_path / "encoder")
    settings = {"scorer": str(encoder), "learning_rate": 1e-12, "epochs": 0.2, "checks": 1}
    weights: list[torch.Tensor] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(weights))
        config = plan(name, seed=seed, **settings)
        run(config)
        weights.append(load_file(config.target / "model.safetensors")["classifier.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)


def test_a_killed_run_from_an_encoder_is_the_unbroken_one(plan: Plan, tmp_path: Path) -> None:
    encoder = save_encoder("modernbert", tmp_path / "encoder")
    settings = {"scorer": str(encoder), "epochs": 0.5, "checks": 1}

    def kill(done: int, *_: object, **__: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    unbroken = run(plan("a", **settings))
    with pytest.raises(KeyboardInterrupt):
        run(plan("b", **settings), kill)
    assert run(plan("b", **settings)).hash == unbroken.hash


def test_the_preset_paper_makes_a_head_of_raw_scores(plan: Plan, tmp_path: Path) -> None:
    encoder = save_encoder("roberta", tmp_path / "encoder")
    config = plan(scorer=str(encoder), preset="paper", epochs=0.5)
    assert run(config).facts["new_head"] == "mse"
    scorer = Scorer.load(str(config.target))
    assert (scorer.head, scorer.encoder.truncation) == ("mse", "longest_first")


def test_a_scorer_keeps_its_head(plan: Plan, scorer_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = plan(learning_rate=1e-12, epochs=0.3, checks=1)
    assert "new_head" not in run(config).facts
    assert not [one for one in caplog.records if "new head" in one.message]
    before, after = (load_file(folder / "model.safetensors") for folder in (scorer_folder, config.target))
    for name in ("classifier.dense.weight", "classifier.out_proj.weight"):
        assert torch.allclose(before[name], after[name], atol=1e-6)


def finetune(folder: Path, plan: Plan) -> None:
    run(plan(scorer=str(folder)))


def pretrain(folder: Path, plan: Plan) -> None:
    config = plan()
    values = {"source": config.source, "target": config.target, "work": config.work, "encoder": str(folder)}
    pretraining.run(build(pretraining.PretrainingConfig, values))


@pytest.mark.parametrize("train", [finetune, pretrain])
@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda folder: drop(folder, "classifier."), ("lack classifier.dense.bias", "again", "AutoModel")),
        (lambda folder: drop(folder, "classifier.out_proj"), ("lack classifier.out_proj.bias", "AutoModel")),
        (lambda folder: drop(folder, "roberta.encoder.layer.1."), ("lack roberta.encoder.layer.1.", "again")),
        (lambda folder: edit(folder / "config.json", num_labels=3, id2label=None), ("3 labels", "AutoModel")),
    ],
)
def test_the_head_of_a_scorer_is_never_made_anew(
    damage: Any, names: tuple[str, ...], train: Any, plan: Plan, tmp_path: Path
) -> None:
    folder = classifier(tmp_path / "scorer")
    damage(folder)
    with raises_naming(FolderError, str(folder), *names):
        train(folder, plan)
    assert not plan().target.exists()


def test_the_remedy_of_a_damaged_head_works(plan: Plan, scorer_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    alone = tmp_path / "alone"
    AutoModel.from_pretrained(scorer_folder).save_pretrained(alone)
    AutoTokenizer.from_pretrained(scorer_folder).save_pretrained(alone)
    assert run(plan(scorer=str(alone), epochs=0.2, checks=1)).facts["new_head"] == "bce"


def test_a_classifier_of_three_labels_and_a_head_of_another_shape_are_refused(plan: Plan, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "nli", labels=3)
    with raises_naming(FolderError, "has 3 labels", "AutoModel"):
        finetune(folder, plan)
    edit(folder / "config.json", num_labels=1, id2label=None, label2id=None)
    with raises_naming(FolderError, "classifier.out_proj", "(3,", "(1,", "config.json"):
        finetune(folder, plan)


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])
def test_an_encoder_that_lacks_weights_is_refused_and_not_filled_with_random_ones(
    family: str, plan: Plan, tmp_path: Path
) -> None:
    folder = save_encoder(family, tmp_path / "encoder")
    layer = "layers.1." if family == "modernbert" else "encoder.layer.1."
    drop(folder, layer)
    for train in (finetune, pretrain):
        with raises_naming(FolderError, str(folder), f"lack {family_prefix(family)}{layer}", "download"):
            train(folder, plan)


def family_prefix(family: str) -> str:
    return {"bert": "bert.", "modernbert": "model.", "deberta-v3": "deberta."}[family]


def test_a_model_for_another_task_is_refused_by_its_class(plan: Plan, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "tags", kind=AutoModelForTokenClassification)
    with raises_naming(FolderError, "RobertaForTokenClassification", "neither a scorer nor an encoder"):
        finetune(folder, plan)


def test_a_configuration_without_a_class_is_decided_by_its_weights(plan: Plan, tmp_path: Path) -> None:
    """As in the published DeBERTa-v3, whose config.json names none."""
    encoder = save_encoder("deberta-v3", tmp_path / "encoder")
    edit(encoder / "config.json", architectures=None)
    assert "new_head" in run(plan("a", scorer=str(encoder), epochs=0.2, checks=1)).facts
    scorer = classifier(tmp_path / "scorer")
    edit(scorer / "config.json", architectures=None)
    assert "new_head" not in run(plan("b", scorer=str(scorer), epochs=0.2, checks=1)).facts
    drop(scorer, "classifier.out_proj")
    with raises_naming(FolderError, "classifier.out_proj"):
        finetune(scorer, plan)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_an_encoder_scores_nothing_and_the_remedy_is_named(family: str, tmp_path: Path) -> None:
    folder = save_encoder(family, tmp_path / "encoder", masked_lm=True)
    with raises_naming(FolderError, str(folder), "is an encoder", "cappy finetuning --scorer", "cappy adapt --scorer"):
        Scorer.load(str(folder))


def test_an_encoder_without_a_tokenizer_is_refused(plan: Plan, tmp_path: Path) -> None:
    folder = save_encoder("bert", tmp_path / "encoder")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with raises_naming(FolderError, str(folder), "no tokenizer"):
        finetune(folder, plan)


def test_records_of_the_encoder_stand_in_the_manifest(plan: Plan, tmp_path: Path) -> None:
    first = save_encoder("bert", tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    manifests = [run(plan(name, scorer=str(tmp_path / name), epochs=0.2, checks=1)) for name in ("first", "second")]
    assert manifests[0].parents == manifests[1].parents, "an encoder is its content, wherever it lies"
    assert read_manifest(plan("first").target).facts["new_head"] == "bce"


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_sentencepiece_model_without_its_conversion_is_one_line(plan: Plan, tmp_path: Path) -> None:
    """The published DeBERTa-v3 has spm.model alone."""
    folder = save_encoder("deberta-v3", tmp_path / "encoder")
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="DebertaV2Tokenizer")
    (folder / "spm.model").write_bytes(b"\n\x05\n\x01a\x15\x00\x00\x00\x00")
    with raises_naming(FolderError, str(folder), "tokenizer cannot be read", "tokenizer.json", "sentencepiece"):
        finetune(folder, plan)
