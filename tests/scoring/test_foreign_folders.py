"""Folders that others wrote: CrossEncoder's number, or one line that says what is not applied (A2, A3, A4)."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import save_encoder
from other_loaders import PAIRS, by_cross_encoder, by_transformers
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)
from wording import assert_names, raises_naming

from cappy.builtin import TINY_SCORER_FOLDER
from cappy.errors import FolderError
from cappy.model_folder import open_model_folder
from cappy.scoring import Scorer
from cappy.scoring.config import ScorerConfig
from cappy.scoring.folder import ACTIVATIONS
from cappy.scoring.model import is_encoder
from cappy.training import finetuning

IDENTITY, SIGMOID = ACTIVATIONS["mse"], ACTIVATIONS["bce"]
NO_FILE = "absent"


def load(folder: Path) -> Scorer:
    return Scorer.load(str(folder), device="cpu", precision="fp32")


def edit(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file; None takes a key away."""
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: value for key, value in {**old, **values}.items() if value is not None}
    path.write_text(json.dumps(kept))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The built-in weights as if others had written them: no manifest, no word of ours, no activation."""
    folder = tmp_path / "bare"
    shutil.copytree(TINY_SCORER_FOLDER, folder)
    for name in ("manifest.json", "trained_on.u64", "training.json"):
        (folder / name).unlink()
    old = dict.fromkeys(("cappy", "sentence_transformers", "sbert_ce_default_activation_function", "problem_type"))
    edit(folder / "config.json", **old)
    return folder


@pytest.fixture
def modular(bare: Path, tmp_path: Path) -> Callable[..., Path]:
    """modular(Identity()) -> the same weights as CrossEncoder 6 writes them."""

    def make(activation: torch.nn.Module, **options: Any) -> Path:
        peer = CrossEncoder(str(bare), device="cpu", activation_fn=activation, **options)
        peer.save_pretrained(str(tmp_path / "modular"))
        return tmp_path / "modular"

    return make


def sigmoid(logits: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-logit)) for logit in logits]


@pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.nn.Sigmoid()])
def test_a2_a_folder_of_cross_encoder_6_has_its_number(activation: torch.nn.Module, modular: Any) -> None:
    folder = modular(activation)
    assert "activation_fn" in json.loads((folder / "config_sentence_transformers.json").read_text())
    result = load(folder)
    assert result.score(PAIRS) == pytest.approx(by_cross_encoder(folder), abs=1e-4)
    assert (min(result.score(PAIRS)) < 0) == (result.head == "mse") == isinstance(activation, torch.nn.Identity)


@pytest.mark.parametrize("head", ["mse", "bce"])
@pytest.mark.parametrize(
    "config",
    [
        lambda path: {"sbert_ce_default_activation_function": path},
        lambda path: {"sentence_transformers": {"activation_fn": path, "version": "4.1.0"}},
        lambda path: {"sentence_transformers": {"activation_fn": path.replace("modules.linear.", "")}},
        lambda path: {"sentence_transformers": {"version": "5.0.0"}, "sbert_ce_default_activation_function": path},
        # The newer place counts where both state something.
        lambda path: {"sentence_transformers": {"activation_fn": path}, "sbert_ce_default_activation_function": "x"},
    ],
)
def test_a2_an_activation_in_config_json_counts_as_every_version_wrote_it(head: str, config: Any, bare: Path) -> None:
    edit(bare / "config.json", **config({"mse": IDENTITY, "bce": SIGMOID}[head]))
    result = load(bare)
    assert result.head == head
    assert result.score(PAIRS) == pytest.approx(by_cross_encoder(bare), abs=1e-4)


def test_a2_a_folder_that_states_no_activation_is_a_sigmoid_and_said_to_be_one_once(
    bare: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert load(bare).score(PAIRS) == pytest.approx(by_cross_encoder(bare), abs=1e-4)
    assert sum("sigmoid" in record.message for record in caplog.records) == 1


def test_a2_our_own_word_counts_where_no_activation_is_stated(bare: Path) -> None:
    edit(bare / "config.json", cappy={"head": "mse", "max_length": 64})
    assert load(bare).head == "mse"


def test_a2_an_activation_that_was_changed_by_others_counts_before_our_own_word(tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    CrossEncoder(str(TINY_SCORER_FOLDER), device="cpu", activation_fn=torch.nn.Identity()).save_pretrained(str(folder))
    assert load(folder).score(PAIRS) == pytest.approx(by_cross_encoder(folder), abs=1e-4)
    assert load(folder).head == "mse"


@pytest.mark.parametrize("path", ["torch.nn.modules.activation.Tanh", "torch.nn.modules.activation.LogSigmoid", 3, []])
@pytest.mark.parametrize("place", ["st", "old", "v6"])
def test_a2_an_unknown_activation_is_refused_by_name(path: Any, place: str, bare: Path, modular: Any) -> None:
    if place == "v6":
        bare = modular(torch.nn.Identity())
        edit(bare / "config_sentence_transformers.json", activation_fn=path)
    elif place == "st":
        edit(bare / "config.json", sentence_transformers={"activation_fn": path})
    else:
        edit(bare / "config.json", sbert_ce_default_activation_function=path)
    with pytest.raises(FolderError, match=r"json: .*activation.*torch\.nn.*Identity.*Sigmoid"):
        load(bare)


def test_a2_a_length_that_cross_encoder_was_saved_with_is_its_length_here(modular: Any) -> None:
    folder = modular(torch.nn.Identity(), max_length=24)
    assert load(folder).encoder.max_length == CrossEncoder(str(folder), device="cpu").max_seq_length == 24
    edit(folder / "sentence_bert_config.json", max_seq_length=20)
    assert load(folder).encoder.max_length == CrossEncoder(str(folder), device="cpu").max_seq_length == 20


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "Is it right? "}, "default_prompt_name": "query"},
            "default_prompt_name .query.*null",
        ),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case "),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 9}}}, "processing_kwargs "),
        ("sentence_bert_config.json", {"tokenizer_args": {"model_max_length": 9}}, "tokenizer_args "),
        ("sentence_bert_config.json", {"a_new_key": 1}, "a_new_key.; remove"),
        ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length .*long"),
        ("sentence_bert_config.json", {"max_seq_length": 4}, "bert_config.json: max_seq_length .* 8 tokens.*4"),
        (
            "sentence_bert_config.json",
            {"transformer_task": "text-generation"},
            "text-generation.*sequence-classification",
        ),
    ],
)
def test_a2_what_cross_encoder_would_apply_and_we_do_not_is_refused(
    name: str, values: Any, message: str, modular: Any
) -> None:
    folder = modular(torch.nn.Identity())
    edit(folder / name, **values)
    with pytest.raises(FolderError, match=message):
        load(folder)


def test_a2_an_empty_default_prompt_changes_nothing(modular: Any) -> None:
    folder = modular(torch.nn.Identity())
    edit(folder / "config_sentence_transformers.json", prompts={"query": "", "other": "x"}, default_prompt_name="query")
    assert load(folder).score(PAIRS) == pytest.approx(by_cross_encoder(folder), abs=1e-4)


def peer_modules(kind: str, encoder: Path) -> Any:
    """A model of sentence-transformers of several modules on an encoder."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    if kind == "static":
        backend = AutoTokenizer.from_pretrained(TINY_SCORER_FOLDER).backend_tokenizer
        return SentenceTransformer(modules=[StaticEmbedding(backend, embedding_dim=8)], device="cpu")
    if kind == "splade":
        body = Transformer(str(encoder), transformer_task="fill-mask")
        return SparseEncoder(modules=[body, SpladePooling()], device="cpu")
    if kind == "logits":
        body = Transformer(str(encoder), transformer_task="text-generation")
        return CrossEncoder(modules=[body, LogitScore(5, 6)], device="cpu")
    body = Transformer(str(encoder), transformer_task="feature-extraction")
    if kind == "sentences":
        return SentenceTransformer(modules=[body, Pooling(32), Normalize()], device="cpu")
    scores = Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    return CrossEncoder(modules=[body, Pooling(32, "cls"), scores], device="cpu")


@pytest.fixture
def save_modules(tmp_path: Path) -> Callable[[str], Path]:
    """save_modules("dense") -> the folder that sentence-transformers writes for such a model."""

    def save(kind: str) -> Path:
        encoder = tmp_path / "encoder"
        if kind == "logits":
            reranker(encoder, pad=0, tokenizer_pad="<pad>")
            edit(encoder / "config.json", architectures=["GPT2LMHeadModel"], sentence_transformers=None)
        else:
            save_encoder("bert", encoder, masked_lm=kind == "splade")
        peer_modules(kind, encoder).save_pretrained(str(tmp_path / kind))
        return tmp_path / kind

    return save


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dense", ("modules.json", "Transformer, Pooling, Dense", "Pooling is not applied here", "new head", "delete")),
        ("logits", ("modules.json", "Transformer, LogitScore", "LogitScore is not applied here", "causal LLM")),
        ("splade", ("is an encoder with SpladePooling, not a scorer", "cappy finetuning --scorer")),
        ("sentences", ("is an encoder with Pooling, Normalize, not a scorer", "cappy finetuning --scorer")),
        ("static", ("not a scorer", "no config.json", "StaticEmbedding", "first module is a Transformer")),
    ],
)
def test_models_of_several_modules_are_refused_by_the_module_when_they_score(
    kind: str, names: tuple[str, ...], save_modules: Callable[[str], Path]
) -> None:
    folder = save_modules(kind)
    with raises_naming(FolderError, str(folder), *names):
        load(folder)


@pytest.mark.parametrize("kind", ["dense", "logits", "static"])
def test_training_does_not_drop_the_head_of_a_modular_cross_encoder(
    kind: str, save_modules: Callable[[str], Path], tmp_path: Path
) -> None:
    with raises_naming(FolderError, "Transformer"):
        finetuning.run(finetuning.FinetuningConfig(scorer=str(save_modules(kind)), source=tmp_path, target=tmp_path))


@pytest.mark.parametrize("kind", ["sentences", "splade"])
def test_the_encoder_of_an_embedding_model_is_an_encoder(kind: str, save_modules: Callable[[str], Path]) -> None:
    folder = open_model_folder(save_modules(kind), pinned=True)
    assert is_encoder(folder, folder.config())
    scorer = Scorer.from_encoder(folder, head="bce", max_length=512)
    assert scorer.has_new_head
    body = scorer.model.base_model.state_dict()
    saved = load_file(folder.path / "model.safetensors")
    same = [
        name for name, value in saved.items() if torch.equal(value, body.get(name.removeprefix("bert."), value[:0]))
    ]
    assert len(same) > 20, "the encoder's own weights, whatever modules follow it"


def test_a_transformer_in_a_folder_of_its_own_is_named(save_modules: Callable[[str], Path]) -> None:
    folder = save_modules("sentences")
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and "modules" not in path.name]:
        path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**modules[0], "path": "0_Transformer"}, *modules[1:]]))
    with raises_naming(FolderError, "not a scorer", "give its folder 0_Transformer"):
        load(folder)


def test_a_cross_encoder_in_a_folder_of_its_own_is_refused(modular: Any) -> None:
    folder = modular(torch.nn.Identity())
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**modules[0], "path": "0"}]))
    with pytest.raises(FolderError, match=r"modules.json: .*.Transformer.*one Transformer in the folder itself"):
        load(folder)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null"])
@pytest.mark.parametrize("name", ["config_sentence_transformers.json", "sentence_bert_config.json", "modules.json"])
def test_a2_files_of_another_shape_are_one_line(name: str, text: str, modular: Any) -> None:
    folder = modular(torch.nn.Identity())
    (folder / name).write_text(text)
    with pytest.raises(FolderError, match=f"{name}: "):
        load(folder)


def test_a2_a_chat_template_that_would_write_pairs_is_refused_and_another_is_said_once(
    bare: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(bare / "config.json", sentence_transformers={"activation_fn": IDENTITY})
    expected = load(bare).score(PAIRS)
    (bare / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for _ in range(2):
        assert load(bare).score(PAIRS) == expected
    assert sum("chat template" in one.message for one in caplog.records) == 1
    (bare / "chat_template.jinja").write_text("{% if m.role in ('query', 'document') %}{{ m.content }}{% endif %}")
    with pytest.raises(FolderError, match=r"chat template.*query, document.*chat_template.jinja"):
        load(bare)


def test_token_types_are_given_as_the_tokenizer_gives_them_unasked(bare: Path) -> None:
    """A1's brother: a folder from others whose tokenizer does not name token types is scored by all without them."""
    edit(bare / "config.json", sentence_transformers={"activation_fn": IDENTITY})
    named = load(bare).score(PAIRS)
    edit(bare / "tokenizer_config.json", model_input_names=None)
    assert load(bare).score(PAIRS) == pytest.approx(by_cross_encoder(bare), abs=1e-4)
    assert load(bare).score(PAIRS) != pytest.approx(named, abs=1e-2)


def reranker(folder: Path, *, pad: int | None, tokenizer_pad: str | None = None, positions: int = 2048) -> Path:
    """A random GPT-2 with a head: a reranker that finds its last token by the padding's number."""
    known = AutoTokenizer.from_pretrained(TINY_SCORER_FOLDER)
    PreTrainedTokenizerFast(
        tokenizer_object=known.backend_tokenizer, pad_token=tokenizer_pad, eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(known), n_positions=positions, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=pad,
        bos_token_id=None, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    edit(folder / "config.json", sentence_transformers={"activation_fn": IDENTITY})
    return folder


@pytest.mark.parametrize(
    ("pad", "tokenizer_pad"), [(None, None), (None, "<pad>"), (0, None), (0, "<pad>"), (5, "<pad>")]
)
def test_a3_a_reranker_without_padding_scores_as_transformers_does_one_pair_at_a_time(
    pad: int | None, tokenizer_pad: str | None, tmp_path: Path
) -> None:
    folder = reranker(tmp_path / "reranker", pad=pad, tokenizer_pad=tokenizer_pad)
    scores = load(folder).score(PAIRS)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        plain = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in PAIRS]
    assert scores == pytest.approx(plain, abs=1e-4)
    assert max(scores) - min(scores) > 0.1
    if pad is not None and tokenizer_pad:
        load(folder).save(tmp_path / "copy")
        assert load(tmp_path / "copy").score(PAIRS) == pytest.approx(scores, abs=1e-4)


def test_a3_a_model_that_reads_the_last_place_is_given_no_padding(tmp_path: Path) -> None:
    """XLNet: its own tokenizer pads on the left, and token types come with a number of their own for its last token."""
    folder = tmp_path / "xlnet"
    tokenizer = AutoTokenizer.from_pretrained(TINY_SCORER_FOLDER, padding_side="left")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=2, d_inner=64, num_labels=1, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    XLNetForSequenceClassification(config).save_pretrained(folder)
    edit(folder / "config.json", sentence_transformers={"activation_fn": IDENTITY})
    assert load(folder).score(PAIRS) == pytest.approx(by_transformers(folder), abs=1e-4)
    assert load(folder).score(PAIRS) == pytest.approx(by_cross_encoder(folder), abs=1e-4)


def test_a1_a_tokenizers_types_are_written_only_for_a_model_that_has_them(
    make_scorer: Callable[..., Path], tmp_path: Path
) -> None:
    """RoBERTa fails on a second type, which nobody else would leave out."""
    scorer = load(make_scorer(seed=32))
    tokenizer = AutoTokenizer.from_pretrained(make_scorer(seed=32))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    again = Scorer(scorer.model, tokenizer, ScorerConfig(head="bce", max_length=48))
    again.save(tmp_path / "copy")
    values = json.loads((tmp_path / "copy/tokenizer_config.json").read_text())
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    assert load(tmp_path / "copy").score(PAIRS) == pytest.approx(again.score(PAIRS), abs=1e-6)
    assert by_cross_encoder(tmp_path / "copy") == pytest.approx(again.score(PAIRS), abs=1e-4)


def test_a4_a_scorer_of_2048_positions_reads_responses_of_1500_words_to_their_end(tmp_path: Path) -> None:
    folder = reranker(tmp_path / "long", pad=0)
    scorer = load(folder)
    assert scorer.encoder.max_length == 2048
    one, other = (f"{'a ' * 1500}{end}" for end in ("red", "blue"))
    scores = scorer.score([("Which?", one), ("Which?", other)])
    assert abs(scores[0] - scores[1]) > 1e-3
    assert scorer.truncation_counts.truncated_pairs == 0


@pytest.mark.parametrize(
    ("length", "positions", "expected"),
    [(128, 256, 128), (10**30, 256, 256), (4096, 256, 256), (10**30, 4096, 4096), (1e30, 16, 16)],
)
def test_a4_the_limit_is_the_tokenizers_or_the_positions_as_cross_encoder_has_it(
    length: int, positions: int, expected: int, tmp_path: Path
) -> None:
    folder = reranker(tmp_path / "limit", pad=0, tokenizer_pad="<pad>", positions=positions)
    edit(folder / "tokenizer_config.json", model_max_length=length)
    assert load(folder).encoder.max_length == expected
    assert CrossEncoder(str(folder), device="cpu").max_seq_length == expected


def test_a4_a_roberta_counts_positions_from_behind_its_padding(make_scorer: Callable[..., Path]) -> None:
    """Padding 0 of 50 positions leaves 49. Where the tokenizer states no length, CrossEncoder cuts at 50 and fails."""
    folder = make_scorer(max_length=48, seed=31)
    (folder / "manifest.json").unlink()
    edit(folder / "config.json", cappy=None)
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    scorer = load(folder)
    assert scorer.encoder.max_length == 49
    assert 0 <= scorer.score([("cat " * 60, "dog " * 60)])[0] <= 1


@pytest.mark.parametrize("length", [3, 0, -1])
def test_a4_a_length_in_which_no_pair_fits_is_refused(length: int, bare: Path) -> None:
    edit(bare / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(FolderError, match=f"model_max_length .* 8 tokens.*{length}"):
        load(bare)


def test_a4_a_cut_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer.load("builtin:tiny", device="cpu", precision="fp32")
    pairs = [("cat", "dog"), ("cat " * 400, "dog"), ("cat", "dog " * 400), ("cat", "dog " * 400)]
    for _ in range(2):
        scorer.score(pairs)
    assert (
        scorer.truncation_counts.pairs,
        scorer.truncation_counts.truncated_pairs,
        scorer.truncation_counts.truncated_responses,
    ) == (
        6,
        4,
        2,
    )
    assert_names(scorer.truncation_counts.text(), "4 of 6 pairs", "256 tokens", "2 responses")
    assert sum("256 tokens" in record.message for record in caplog.records) == 1


LONG = [
    ("one " + "cat " * 40 + "two", "blue bird"),
    ("one", "red " * 50 + "cat"),
    ("cat " * 30 + "dog", "red " * 31 + "dog"),
    ("the dog " * 9, "the red cat " * 7),
    ("short", "pair"),
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [12, 23])
def test_a4_a_pair_that_is_too_long_has_cross_encoders_number_too(
    length: int, side: str, modular: Any, tmp_path: Path
) -> None:
    folder = modular(torch.nn.Identity(), max_length=length)
    edit(folder / "tokenizer_config.json", truncation_side=side)
    expected = CrossEncoder(str(folder), device="cpu").predict(LONG).tolist()
    result = load(folder)
    assert result.score(LONG) == pytest.approx(expected, abs=1e-4)
    assert result.truncation_counts.truncated_pairs == 4
    result.save(tmp_path / "saved")
    assert load(tmp_path / "saved").score(LONG) == pytest.approx(expected, abs=1e-4)
    assert by_cross_encoder(tmp_path / "saved", LONG) == pytest.approx(expected, abs=1e-4)


def test_a4_a_folder_of_ours_keeps_its_cut(bare: Path) -> None:
    edit(bare / "config.json", cappy={"head": "mse", "max_length": 16})
    assert load(bare).encoder.truncation == "middle"
