"""Every folder that we ship or write has one number: here, in plain transformers and in CrossEncoder (A1, A6)."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from other_loaders import PAIRS, by_cross_encoder, by_transformers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from cappy.builtin import TINY_SCORER_FOLDER
from cappy.config import build
from cappy.errors import ConfigError, FolderError
from cappy.records import Candidate, Instance, write
from cappy.records.folder import describe_files, read_manifest, write_manifest
from cappy.scoring import Scorer
from cappy.scoring.config import ScorerConfig
from cappy.training import finetuning, pretraining

WORDS = "cat dog bird mat tree blue red one two three".split()


def here(folder: Path, **options: str) -> list[float]:
    return Scorer.load(str(folder), device="cpu", **{"precision": "fp32", **options}).score(PAIRS)  # type: ignore[arg-type]


def assert_one_number(folder: Path) -> None:
    expected = here(folder)
    assert max(expected) - min(expected) > 1e-3, "a scorer that gives one number to all would pass too"
    assert by_transformers(folder) == pytest.approx(expected, abs=1e-4)
    assert by_cross_encoder(folder) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instances of which training learns in seconds that the last word is right."""
    folder = tmp_path_factory.mktemp("records") / "annotated"
    instances = [
        Instance(
            instance_id=str(number),
            instruction=f"{number} " + " ".join(WORDS[number % 5 : number % 5 + 4]),
            references=("r",),
            split="validation" if number % 4 == 3 else "train",
            candidates=tuple(
                Candidate(response=word, labels={"rougeL": float(word == WORDS[number % 5 + 3])}) for word in WORDS
            ),
        )
        for number in range(40)
    ]
    write(folder, instances)
    return folder


Trained = Callable[..., Path]


@pytest.fixture
def trained(annotated: Path, tmp_path: Path) -> Trained:
    """trained("pretraining", **settings) -> the scorer folder of a short training by the step itself."""

    def make(step: str, **settings: object) -> Path:
        env = tmp_path / step
        kind = finetuning.FinetuningConfig if step == "finetuning" else pretraining.PretrainingConfig
        given = {
            "source": annotated,
            "target": env / "scorer",
            "work": env / "work",
            "epochs": 1.0,
            "checks": 1,
        }
        run = finetuning.run if step == "finetuning" else pretraining.run
        run(build(kind, {**given, **settings}))  # type: ignore[arg-type]
        return env / "scorer"

    return make


def test_a1_the_committed_built_in_weights_have_one_number_everywhere() -> None:
    assert_one_number(TINY_SCORER_FOLDER)


@pytest.mark.parametrize("head", ["bce", "mse"])
def test_a1_a_saved_copy_of_either_head_has_one_number_everywhere(head: str, tmp_path: Path) -> None:
    scorer = Scorer.load("builtin:tiny", device="cpu", precision="fp32")
    scorer.head = head  # type: ignore[assignment]
    scorer.save(tmp_path / "copy")
    assert_one_number(tmp_path / "copy")
    assert Scorer.load(str(tmp_path / "copy")).head == head


def test_a1_a_scorer_finetuned_from_the_built_in_one_has_one_number_everywhere(trained: Trained) -> None:
    folder = trained("finetuning", scorer="builtin:tiny")
    assert_one_number(folder)
    assert here(folder) != pytest.approx(here(TINY_SCORER_FOLDER), abs=1e-3)


@pytest.mark.parametrize("head", ["bce", "mse"])
def test_a1_a_scorer_of_a_new_built_in_encoder_has_one_number_everywhere(head: str, trained: Trained) -> None:
    assert_one_number(trained("pretraining", head=head, layers=2, max_length=64))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT of 40 positions; its tokenizer makes token types, says nothing of them, and has a chat template."""
    folder = tmp_path / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(TINY_SCORER_FOLDER)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", cls_token="<s>", sep_token="</s>"
    )
    bare.chat_template = "{% for m in messages %}{{ m['role'] == 'query' or 'document' }}{{ m['content'] }}{% endfor %}"
    bare.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(
        BertConfig(vocab_size=len(bare), max_position_embeddings=40, initializer_range=0.3, pad_token_id=0, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head", ["bce", "mse"])
def test_a1_a_scorer_of_any_encoder_has_one_number_everywhere(head: str, encoder: Path, trained: Trained) -> None:
    folder = trained("pretraining", encoder=str(encoder), head=head)
    assert_one_number(folder)
    loaded = Scorer.load(str(folder), precision="fp32")
    assert loaded.encoder.has_token_types, "trained with the token types that its model has"
    assert loaded.encoder.max_length == 40, "no more tokens than the encoder has positions"
    assert not (folder / "chat_template.jinja").exists()


def test_a1_a_folder_says_its_length_and_inputs_in_the_tokenizers_own_file(
    make_scorer: Callable[..., Path],
) -> None:
    """By names that every version of transformers knows, whatever was known when it was written."""
    for folder, names in ((TINY_SCORER_FOLDER, 3), (make_scorer(max_length=32), 2)):
        values = json.loads((folder / "tokenizer_config.json").read_text())
        assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert len(values["model_input_names"]) == names
        assert values["model_max_length"] == Scorer.load(str(folder)).encoder.max_length


@pytest.fixture
def earlier(trained: Trained) -> Path:
    """A scorer finetuned from the built-in one, its files as the release before wrote them, and its scores beside."""
    folder = trained("finetuning", scorer="builtin:tiny")
    (folder.parent / "scores.json").write_text(json.dumps(here(folder)))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values.pop("model_input_names")
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": "TokenizersBackend"}))
    return folder


def signed(folder: Path) -> Path:
    write_manifest(folder, replace(read_manifest(folder), files=describe_files(folder)))
    return folder


def test_a1_a_scorer_of_the_release_before_is_recognised_and_mended_when_saved(
    earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_types = json.loads((earlier.parent / "scores.json").read_text())
    assert by_cross_encoder(earlier) != pytest.approx(with_types, abs=1e-2), "what others read of it is another number"
    assert here(signed(earlier)) == pytest.approx(with_types, abs=1e-6)
    assert here(earlier) == pytest.approx(with_types, abs=1e-6)
    assert [record.message.count("does not name token types") for record in caplog.records].count(1) == 1
    Scorer.load(str(earlier), device="cpu", precision="fp32").save(tmp_path / "mended")
    assert here(tmp_path / "mended") == pytest.approx(with_types, abs=1e-6)
    assert_one_number(tmp_path / "mended")


def test_a1_the_same_files_from_others_are_scored_as_others_read_them(earlier: Path) -> None:
    """Without our manifest nobody knows what it was trained with: one folder, one number."""
    (earlier / "manifest.json").unlink()
    assert here(earlier) == pytest.approx(by_cross_encoder(earlier), abs=1e-4)


def test_a6_a_scorer_loaded_in_bf16_saves_what_was_loaded(tmp_path: Path) -> None:
    exact = here(TINY_SCORER_FOLDER)
    scorer = Scorer.load("builtin:tiny", device="cpu", precision="bf16")
    assert scorer.score(PAIRS) != exact
    scorer.save(tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (TINY_SCORER_FOLDER / "model.safetensors").read_bytes()
    assert here(tmp_path / "copy") == exact
    assert here(tmp_path / "copy", precision="bf16") == pytest.approx(scorer.score(PAIRS), abs=1e-6)


def test_a6_a_folder_that_changed_since_it_was_loaded_in_bf16_is_not_saved(
    make_scorer: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_scorer(seed=21)
    (folder / "manifest.json").unlink()
    scorer = Scorer.load(str(folder), device="cpu", precision="bf16")
    (folder / "notes.txt").write_text("new")
    with pytest.raises(FolderError, match=f"{folder}: .*changed"):
        scorer.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a6_a_scorer_made_in_bf16_without_a_folder_is_not_saved(tmp_path: Path) -> None:
    exact = Scorer.load("builtin:tiny", device="cpu", precision="fp32")
    low = Scorer(exact.model, exact.tokenizer, ScorerConfig(head="bce", max_length=64), precision="bf16")
    with pytest.raises(ConfigError, match="bf16.*precision fp32"):
        low.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["modules.json", "config_sentence_transformers.json", "chat_template.jinja"])
def test_nothing_is_saved_beside_files_that_would_change_its_number(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(FolderError, match=f"{name}: "):
        Scorer.load("builtin:tiny", precision="fp32").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
