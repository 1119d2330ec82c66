"""A5: the pick is that of the highest logit, however near to 1 the sigmoid is."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from cappy.scoring import Scorer
from cappy.scoring.config import ChosenPrecision
from cappy.scoring.encoding import Encoded

RESPONSES = ["cat", "red bird", "the dog sat on the mat", "two"]


@pytest.fixture
def given(scorer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scorer]:
    """given([27.3, 30.2]) -> a scorer that answers these logits to `RESPONSES`, by the length of a pair."""

    def make(logits: Sequence[float], precision: ChosenPrecision = "fp32") -> Scorer:
        scorer = Scorer.load(str(scorer_folder), device="cpu", precision=precision)
        lengths = [len(pair.ids) for pair in scorer.encoder.encode([("x", text) for text in RESPONSES[: len(logits)]])]
        assert len(set(lengths)) == len(lengths)
        known = dict(zip(lengths, logits, strict=True))

        def forward(batch: Sequence[Encoded]) -> torch.Tensor:
            return torch.tensor([known[len(pair.ids)] for pair in batch])

        monkeypatch.setattr(scorer, "forward", forward)
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
