"""Pairs that are too long: cut as the folder says, and the folder says it to whoever loads it next."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cappy.errors import FolderError
from cappy.scoring import Scorer
from cappy.scoring.config import ScorerConfig
from cappy.scoring.encoding import PairEncoder


def test_longest_first_is_what_transformers_does(scorer_folder: Path) -> None:
    """On every side of the halves: short, long and equally long texts, odd and even room."""
    tokenizer = AutoTokenizer.from_pretrained(scorer_folder)
    for instruction, response, max_length in itertools.product(range(1, 10), range(1, 10), range(8, 14)):
        pair = ("red " * instruction, "red " * response)
        (encoded,) = PairEncoder(tokenizer, max_length, "longest_first").encode([pair])
        expected = tokenizer(*pair, truncation=True, max_length=max_length)["input_ids"]
        assert list(encoded.ids) == expected, (instruction, response, max_length)
        kept = expected[expected.index(tokenizer.sep_token_id) + 2 : -1]
        assert encoded.cut == (kept != tokenizer(pair[1], add_special_tokens=False)["input_ids"])


def test_a_folder_keeps_its_truncation_and_scores_long_pairs_as_cross_encoder_then(
    make_scorer: Callable[..., Path], tmp_path: Path
) -> None:
    from sentence_transformers import CrossEncoder

    usual = Scorer.load(str(make_scorer(head="mse", max_length=16)), precision="fp32")
    published = Scorer(
        usual.model, usual.tokenizer, ScorerConfig(head="mse", max_length=16, truncation="longest_first")
    )
    published.save(tmp_path / "published")
    pairs = [("one " + "cat " * 30 + "two", "blue bird"), ("one", "red " * 30), ("cat " * 20, "red " * 20)]
    peer = CrossEncoder(str(tmp_path / "published"), device="cpu", max_length=16)
    again = Scorer.load(str(tmp_path / "published"), precision="fp32")
    assert again.encoder.truncation == "longest_first"
    assert again.score(pairs) == pytest.approx(peer.predict(pairs).tolist(), abs=1e-4)
    assert usual.score(pairs)[0] != pytest.approx(again.score(pairs)[0], abs=1e-6), "the middle is gone in both"


def test_the_usual_truncation_is_not_written_down(make_scorer: Callable[..., Path], tmp_path: Path) -> None:
    Scorer.load(str(make_scorer()), precision="fp32").save(tmp_path / "again")
    recorded = json.loads((tmp_path / "again" / "config.json").read_text())["cappy"]
    assert set(recorded) == {"head", "max_length"}


def test_an_unknown_truncation_is_one_line(make_scorer: Callable[..., Path]) -> None:
    folder = make_scorer()
    config = json.loads((folder / "config.json").read_text())
    config["cappy"]["truncation"] = "left"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(FolderError, match=r"^config.json: cappy.truncation .*middle.*longest_first.*left"):
        Scorer.load(str(folder))
