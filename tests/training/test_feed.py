"""What the loop eats: whole instances, every one once a pass, the same under the same seed."""

import pytest

from cappy.errors import RecordError
from cappy.records import Candidate, Instance
from cappy.training.feed import Group, batches, micro_batches, pools_to_check, to_group


def group(number: int, size: int = 6) -> Group:
    return Group(
        instruction=str(number),
        responses=tuple(f"{number}.{i}" for i in range(size)),
        labels=tuple(i / size for i in range(size)),
        selectable=tuple(i > 0 for i in range(size)),
    )


GROUPS = [group(number) for number in range(23)]


def test_a_pass_holds_every_instance_once_and_differs_from_the_next() -> None:
    first = [g.instruction for batch in batches(GROUPS, 5, 9, seed=1, epoch=0) for g in batch]
    second = [g.instruction for batch in batches(GROUPS, 5, 9, seed=1, epoch=1) for g in batch]
    assert sorted(first, key=int) == [g.instruction for g in GROUPS]
    assert first != second
    assert first == [g.instruction for batch in batches(GROUPS, 5, 9, seed=1, epoch=0) for g in batch]


def test_drawn_candidates_keep_their_labels() -> None:
    for batch in batches(GROUPS, 5, 3, seed=1, epoch=0):
        for drawn in batch:
            assert len(drawn.responses) == 3
            assert drawn.labels == tuple(int(text.split(".")[1]) / 6 for text in drawn.responses)


def test_micro_batches_keep_instances_whole_and_within_the_budget() -> None:
    batch = [group(number, size=2 + number % 3) for number in range(9)]
    lengths = [[10 * (number + 1)] * len(g.responses) for number, g in enumerate(batch)]
    micros = list(micro_batches(batch, lengths, 300))
    assert sorted(index for micro in micros for index in micro) == list(range(9))
    for micro in micros:
        width = max(length for index in micro for length in lengths[index])
        assert len(micro) == 1 or width * sum(len(lengths[index]) for index in micro) <= 300


def test_pools_to_check_hold_what_a_selector_may_pick() -> None:
    pools = pools_to_check(GROUPS, 4, seed=0)
    assert all(len(pool.responses) == 4 and all(pool.selectable) for pool in pools)
    assert pools == pools_to_check(GROUPS, 4, seed=0)


def test_a_sampled_response_outranks_a_mismatch_of_the_same_text_and_labels_must_be_there() -> None:
    both = (
        Candidate(response="x", labels={"rougeL": 0.5}),
        Candidate(response="x", source="mismatch", labels={"rougeL": 0.0}),
    )
    instance = Instance(instance_id="1", instruction="i", references=("r",), candidates=both)
    assert to_group(instance, "rougeL").labels == (0.5,)
    with pytest.raises(RecordError, match="instance '1': a candidate has no label 'bleu'; run cappy annotation"):
        to_group(instance, "bleu")


def test_sources_can_be_left_out_and_what_a_selector_may_pick_stays_known() -> None:
    candidates = (
        Candidate(response="r", source="reference", labels={"rougeL": 1.0}),
        Candidate(response="r", labels={"rougeL": 0.9}),
        Candidate(response="x", labels={"rougeL": 0.5}),
        Candidate(response="m", source="mismatch", labels={"rougeL": 0.0}),
    )
    instance = Instance(instance_id="1", instruction="i", references=("r",), candidates=candidates)
    whole = to_group(instance, "rougeL")
    assert (whole.responses, whole.labels, whole.selectable) == (("r", "x", "m"), (1.0, 0.5, 0.0), (True, True, False))
    assert to_group(instance, "rougeL", ("llm",)).responses == ("x",)
    assert to_group(instance, "rougeL", ("reference", "mismatch")).responses == ("r", "m")
