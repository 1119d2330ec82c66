"""One folder, one number: whoever loads it, and whatever else is scored beside it."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cappy.errors import ConfigError, FolderError
from cappy.records import Instance, write
from cappy.scoring import Scorer
from cappy.scoring.config import ChosenPrecision, ScorerConfig
from cappy.scoring.encoding import EncodedPair, PairEncoder
from cappy.scoring.model import batch_by_length

WORDS = "the a cat dog bird sat ran flew on in mat tree blue red one two three".split()


def texts(count: int, longest: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


PAIRS = list(zip(texts(40, 12, 1), texts(40, 5, 2), strict=True))


@pytest.fixture(scope="module")
def scorer(scorer_folder: Path) -> Scorer:
    return Scorer.load(str(scorer_folder), precision="fp32")


def plain(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """Plain transformers, one pair at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0].item() for pair in pairs]


def test_scores_equal_plain_transformers(scorer: Scorer, scorer_folder: Path) -> None:
    expected = [torch.tensor(logit).sigmoid().item() for logit in plain(scorer_folder, PAIRS)]
    assert scorer.score(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.05, "a scorer that gives one number to all would pass too"


def test_scores_equal_cross_encoder_for_both_heads(make_scorer: Callable[..., Path]) -> None:
    from sentence_transformers import CrossEncoder

    for head in ("bce", "mse"):
        folder = make_scorer(head=head, seed=3)
        peer = CrossEncoder(str(folder), device="cpu")
        assert Scorer.load(str(folder), precision="fp32").score(PAIRS) == pytest.approx(
            peer.predict(PAIRS).tolist(), abs=1e-4
        )


def test_scores_do_not_depend_on_order_batch_or_company(scorer: Scorer) -> None:
    together = dict(zip(PAIRS, scorer.score(PAIRS), strict=True))
    shuffled = random.Random(0).sample(PAIRS, len(PAIRS))
    assert scorer.score(shuffled) == pytest.approx([together[pair] for pair in shuffled], abs=1e-4)
    for pair in PAIRS[:8]:
        assert scorer.score([pair])[0] == pytest.approx(together[pair], abs=1e-4)


def test_equal_pairs_get_equal_scores_and_a_stream_scores_as_a_list(scorer: Scorer) -> None:
    scores = scorer.score([PAIRS[0], PAIRS[1], PAIRS[0]])
    assert scores[0] == scores[2]
    assert list(scorer.score_stream(iter(PAIRS))) == scorer.score(PAIRS)
    assert scorer.score([]) == []


def test_a_stream_scores_its_duplicates_once_and_holds_one_chunk_at_a_time(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy.scoring.scorer.CHUNK_PAIRS", 8)
    forwarded: list[int] = []
    forward = scorer.infer_logits

    def counted(batch: Any) -> Any:
        forwarded.append(len(batch))
        return forward(batch)

    monkeypatch.setattr(scorer, "infer_logits", counted)
    taken = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for taken in itertools.count(1):
            yield PAIRS[taken % 2]

    scores = list(itertools.islice(scorer.score_stream(endless()), 16))
    assert taken == 16
    assert sum(forwarded) == 4, "two distinct pairs in each chunk of eight"
    assert len(set(scores)) == 2


def test_a_stream_of_pools_selects_as_one_pool_at_a_time(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cappy.scoring.scorer.CHUNK_PAIRS", 8)
    pools = [(instruction, texts(1 + n % 5, 5, n)) for n, (instruction, _) in enumerate(PAIRS)]
    for (instruction, responses), selection in zip(pools, scorer.select_stream(iter(pools)), strict=True):
        alone = scorer.select(instruction, responses)
        assert (selection.index, selection.response) == (alone.index, alone.response)
        assert selection.scores == pytest.approx(alone.scores, abs=1e-4)


def test_rank_and_select_agree_and_the_first_of_equals_wins(scorer: Scorer) -> None:
    responses = texts(6, 5, 9)
    ranked = scorer.rank("where is the cat", responses)
    selection = scorer.select("where is the cat", responses)
    assert ranked[0] == (selection.index, max(selection.scores))
    assert [score for _, score in ranked] == sorted(selection.scores, reverse=True)
    assert scorer.select("where is the cat", ["dog", "dog"]).index == 0
    with pytest.raises(ConfigError, match="select: "):
        scorer.select("where is the cat", [])


def test_a_long_instruction_is_cut_in_the_middle_and_the_response_never(scorer: Scorer) -> None:
    tokenizer = scorer.tokenizer
    instruction, response = "one " + "cat " * 60 + "two", "blue bird"
    (encoded,) = scorer.encoder.encode([(instruction, response)])
    text = tokenizer.decode(encoded.ids)
    assert len(encoded.ids) == scorer.encoder.max_length
    assert text.startswith("<s>one cat")
    assert "two</s></s>blue bird</s>" in text
    assert not encoded.response_truncated


def test_a_response_longer_than_the_model_loses_its_end_and_is_flagged(scorer: Scorer) -> None:
    (encoded,) = scorer.encoder.encode([("one", "red " * 200)])
    assert encoded.response_truncated
    assert len(encoded.ids) == scorer.encoder.max_length
    assert 0 <= scorer.score([("one", "red " * 200)])[0] <= 1


def test_a_pair_fits_exactly_where_none_of_its_tokens_is_cut(scorer: Scorer) -> None:
    encoder = scorer.encoder
    pairs = [("cat " * count, "red bird") for count in range(80)] + [("one", "red " * 200)]
    whole = []
    for pair, encoded in zip(pairs, encoder.encode(pairs), strict=True):
        asked = sum(map(len, encoder.tokenize(list(pair)))) + encoder.num_special_tokens
        whole.append(asked == len(encoded.ids))
    assert encoder.fits(pairs) == whole
    assert set(whole) == {True, False}


def test_batches_hold_every_pair_once_within_the_budget() -> None:
    encoded = [EncodedPair(ids=(1,) * length, types=(0,) * length) for length in (5, 90, 3, 40, 41, 7, 300)]
    batches = list(batch_by_length(encoded, budget=100))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(encoded[i].ids) for i in batch) <= 100


def test_saving_and_loading_keeps_the_scores(scorer: Scorer, tmp_path: Path) -> None:
    manifest = scorer.save(tmp_path / "copy")
    loaded = Scorer.load(str(tmp_path / "copy"), precision="fp32")
    assert loaded.version == manifest.hash[:12]
    assert loaded.head == scorer.head
    assert loaded.score(PAIRS) == scorer.score(PAIRS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "deep/optimizer.pt", "state.pkl"])
def test_a_pickle_in_the_folder_is_refused(make_scorer: Callable[..., Path], name: str) -> None:
    folder = make_scorer(seed=5)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(FolderError, match=f"{Path(name).name}.*safetensors"):
        Scorer.load(str(folder))


def test_a_damaged_weight_is_refused(make_scorer: Callable[..., Path]) -> None:
    folder = make_scorer(seed=6)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(FolderError, match="model.safetensors: .*damaged"):
        Scorer.load(str(folder))


def test_remote_code_is_never_asked_for(make_scorer: Callable[..., Path]) -> None:
    folder = make_scorer(seed=7)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(FolderError, match=r"config.json: .*auto_map"):
        Scorer.load(str(folder))


@pytest.mark.parametrize("text", ["{}", '{"model_type": "none such"}', "[", "[]", '{"model_type": 3}'])
def test_a_configuration_that_is_no_models_is_one_line(text: str, make_scorer: Callable[..., Path]) -> None:
    folder = make_scorer(seed=7)
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text(text)
    with pytest.raises(FolderError, match=r"config.json.* (is|does) not .*; (give|download|delete)"):
        Scorer.load(str(folder))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "nowhere: .*builtin"),
        ("hub:org/name", "hub:org/name@revision"),
        ("hub:org/name@main", "revision.*commit hash"),
        ("openai:m@http://x/v1", "endpoint can sample"),
        ("openai:m", "openai:m@URL"),
        ("models:/cappy", "models:/name@alias"),
        ("", "empty"),
    ],
)
def test_a_wrong_spec_is_one_line_with_the_right_form(spec: str, message: str) -> None:
    with pytest.raises((ConfigError, FolderError), match=message):
        Scorer.load(spec)


def test_a_folder_of_records_is_no_scorer_and_said_to_be_none(tmp_path: Path) -> None:
    write(tmp_path / "annotated", [Instance(instance_id="1", instruction="i", references=("r",))])
    with pytest.raises(FolderError, match=r"annotated: .*config.json.*a scorer is"):
        Scorer.load(str(tmp_path / "annotated"))


def test_a_pair_may_be_any_sequence_of_two_texts(scorer_folder: Path) -> None:
    """Lists are CrossEncoder's usual form, rows of an array pandas' and datasets'."""
    scorer = Scorer.load(str(scorer_folder), precision="fp32")
    pairs = [("one", "red cat"), ("two", "blue bird"), ("one", "red cat")]
    expected = scorer.score(pairs)
    forms: list[Any] = [[list(pair) for pair in pairs], tuple(pairs), np.array(pairs)]
    for given in (*forms, [pairs[0], list(pairs[1]), pairs[2]]):
        assert scorer.score(given) == expected
        assert list(scorer.score_stream(iter(given))) == expected
        assert scorer.scores_of(scorer.logits_of(given)) == expected
    assert scorer.score([]) == []


@pytest.mark.parametrize(
    "pairs", [["ab"], ["one", "two"], [("a",)], [["a", "b", "c"]], [("a", 1)], [{"a": 1, "b": 2}], [7]]
)
def test_what_is_no_pair_is_one_line(pairs: Any, scorer_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^score: .*\[instruction, response\]"):
        Scorer.load(str(scorer_folder), precision="fp32").score(pairs)


RESPONSES = ["cat", "red bird", "the dog sat on the mat", "two"]


@pytest.fixture
def given(scorer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scorer]:
    """given([27.3, 30.2]) -> a scorer that answers these logits to `RESPONSES`, by the length of a pair."""

    def make(logits: Sequence[float], precision: ChosenPrecision = "fp32") -> Scorer:
        scorer = Scorer.load(str(scorer_folder), device="cpu", precision=precision)
        lengths = [len(pair.ids) for pair in scorer.encoder.encode([("x", text) for text in RESPONSES[: len(logits)]])]
        assert len(set(lengths)) == len(lengths)
        known = dict(zip(lengths, logits, strict=True))

        def forward(batch: Sequence[EncodedPair]) -> torch.Tensor:
            return torch.tensor([known[len(pair.ids)] for pair in batch])

        monkeypatch.setattr(scorer, "infer_logits", forward)
        return scorer

    return make


@pytest.mark.parametrize("logits", [[27.3, 30.2], [60.0, 59.0, 61.0], [-200.0, -150.0, -900.0], [1.0, 2.0, 0.5, 1.5]])
def test_a5_rank_select_and_streams_pick_the_highest_logit(logits: list[float], given: Callable[..., Scorer]) -> None:
    scorer, responses = given(logits), RESPONSES[: len(logits)]
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    assert [index for index, _ in scorer.rank("x", responses)] == order
    selection = scorer.select("x", responses)
    assert (selection.index, selection.response) == (order[0], responses[order[0]])
    assert selection.logits == pytest.approx(logits)
    for pick in itertools.islice(scorer.select_stream([("x", responses)] * 3), 3):
        assert pick.index == order[0]
    assert scorer.logits_of([("x", text) for text in responses]) == pytest.approx(logits)


def test_a5_scores_themselves_tell_logits_apart_that_fp32_takes_for_1(given: Callable[..., Scorer]) -> None:
    """What takes scores alone, as evaluation does, sees no ties below a logit of 36."""
    assert torch.tensor([27.3, 30.2]).sigmoid().tolist() == [1.0, 1.0]
    one, other = given([27.3, 30.2]).score([("x", text) for text in RESPONSES[:2]])
    assert one < other <= 1.0


def test_a5_equal_logits_keep_the_first(given: Callable[..., Scorer]) -> None:
    assert given([30.0, 30.0]).select("x", RESPONSES[:2]).index == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a5_real_weights_far_above_0_rank_as_they_do_near_it(precision: ChosenPrecision, scorer_folder: Path) -> None:
    near, far = (Scorer.load(str(scorer_folder), device="cpu", precision=precision) for _ in range(2))
    far.model.classifier.out_proj.bias.data += 50
    assert [index for index, _ in far.rank("x", RESPONSES)] == [index for index, _ in near.rank("x", RESPONSES)]
    assert len({score for _, score in far.rank("x", RESPONSES)}) == 1, "their scores are all 1"


def test_longest_first_is_what_transformers_does(scorer_folder: Path) -> None:
    """On every side of the halves: short, long and equally long texts, odd and even room."""
    tokenizer = AutoTokenizer.from_pretrained(scorer_folder)
    for instruction, response, max_length in itertools.product(range(1, 10), range(1, 10), range(8, 14)):
        pair = ("red " * instruction, "red " * response)
        (encoded,) = PairEncoder(tokenizer, max_length, "longest_first").encode([pair])
        expected = tokenizer(*pair, truncation=True, max_length=max_length)["input_ids"]
        assert list(encoded.ids) == expected, (instruction, response, max_length)
        kept = expected[expected.index(tokenizer.sep_token_id) + 2 : -1]
        assert encoded.response_truncated == (kept != tokenizer(pair[1], add_special_tokens=False)["input_ids"])


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
