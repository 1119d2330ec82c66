"""Tokenizers from elsewhere: what makes gigabytes of a sentence is refused before a sentence goes through it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.errors import FolderError
from cappy.model_folder import open_model_folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
START = {"SpecialToken": {"id": "<s>", "type_id": 0}}
SPECIAL = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "doubled": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("aa", String="a")] * 40}},
        "its normalizer makes texts up to 128 times longer",
    ),
    "between all characters": ({"normalizer": replace("a" * 200, Regex="")}, "makes texts up to 201 times longer"),
    "nested": (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Sequence", "normalizers": [replace("aaaa", String="a")] * 2}] * 2,
            }
        },
        "its normalizer makes texts up to 256 times longer",
    ),
    "before": ({"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}}, "normalizer.prepend has 1,000,000"),
    "many": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1_000}}, "more than 64 components"),
    "special tokens": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [A],
                "pair": [A, *[START] * 1_000, B],
                "special_tokens": SPECIAL,
            }
        },
        "its post_processor adds 1,002 tokens",
    ),
    "ids of a special token": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [START, A],
                "pair": [START, A, B],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0] * 1_000, "tokens": ["<s>"] * 1_000}},
            }
        },
        "post_processor .*1,000 tokens",
    ),
}


@pytest.mark.parametrize(("parts", "words"), BOMBS.values(), ids=BOMBS)
def test_a_tokenizer_that_multiplies_texts_is_refused(parts: dict[str, Any], words: str, foreign: Path) -> None:
    edit(foreign / "tokenizer.json", **parts)
    with pytest.raises(FolderError, match=f"tokenizer .*{words}"):
        open_model_folder(foreign).tokenizer()


def test_replacements_as_published_tokenizers_have_them_are_read(foreign: Path) -> None:
    usual = [{"type": "Prepend", "prepend": "▁"}, replace("▁", String=" "), replace('"', String="``"), {"type": "NFKC"}]
    edit(foreign / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": usual})
    assert open_model_folder(foreign).tokenizer()("a")["input_ids"]


def test_a_panic_of_the_tokenizers_library_is_one_line(foreign: Path) -> None:
    edit(
        foreign / "tokenizer.json", model={"type": "WordLevel", "vocab": {"<unk>": 4_000_000_000}, "unk_token": "<unk>"}
    )
    try:
        open_model_folder(foreign).tokenizer()
    except FolderError as error:
        assert "tokenizer" in str(error)  # noqa: PT017 (other versions may read it)


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_a_table_of_a_tokenizer_is_no_path(key: str, foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"SECRET": 0}')
    edit(foreign / "tokenizer_config.json", **{key: str(tmp_path / "secret.json")})
    with pytest.raises(FolderError, match=f"tokenizer_config.json: .*other files .*{key}"):
        open_model_folder(foreign)


def test_an_index_names_no_hidden_weights_which_nobody_hashed(foreign: Path) -> None:
    (foreign / "model.safetensors").rename(foreign / ".weights.safetensors")
    edit(foreign / "model.safetensors.index.json", weight_map={"classifier.weight": ".weights.safetensors"})
    with raises_naming(FolderError, "model.safetensors.index.json: ", "'.weights.safetensors'"):
        open_model_folder(foreign)


@pytest.mark.parametrize("name", ["model.safetensors", "special_tokens_map.json"])
def test_a_pipe_that_nobody_writes_to_is_not_opened(name: str, foreign: Path) -> None:
    (foreign / name).unlink(missing_ok=True)
    os.mkfifo(foreign / name)
    with pytest.raises(FolderError, match="is not a file"):
        open_model_folder(foreign)
