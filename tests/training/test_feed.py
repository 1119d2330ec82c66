"""What the loop eats: whole instances, every one once a pass, the same under the same seed, in constant memory."""

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from wording import raises_naming

from cappy.errors import RecordError
from cappy.records import Candidate, Instance, write
from cappy.records.instance import SOURCES, Split
from cappy.scoring.encoding import PairEncoder
from cappy.training.corpus import Corpus, CorpusWriter, TrainingInstance, open_corpora, to_training_instance
from cappy.training.feed import (
    DrawnInstance,
    assign_passes,
    draw_batch,
    draw_validation,
    padded_tokens,
    permute,
    split_batch,
)

LENGTH = 48


def group(number: int, size: int = 6) -> TrainingInstance:
    return TrainingInstance(
        instruction=f"the cat sat {'on ' * (number % 5)}{number}",
        responses=tuple(f"{number}.{i}" for i in range(size)),
        labels=tuple(i / size for i in range(size)),
        selectable=tuple(i > 0 for i in range(size)),
        sources=tuple(SOURCES[i % len(SOURCES)] for i in range(size)),
    )


GROUPS = [group(number, 2 + number % 5) for number in range(23)]


@pytest.fixture(scope="module")
def encoder(scorer_folder: Path) -> PairEncoder:
    return PairEncoder(AutoTokenizer.from_pretrained(scorer_folder), LENGTH)


@pytest.fixture(scope="module")
def corpus(encoder: PairEncoder, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "train"
    named = [(f"id {number}é", one) for number, one in enumerate(GROUPS)]
    with CorpusWriter(folder, encoder, 330) as writer:
        writer.add(named[:10])
        writer.add(named[10:])
    return Corpus(folder, encoder)


def test_a_corpus_gives_back_what_the_encoder_would_make_of_the_texts(corpus: Corpus, encoder: PairEncoder) -> None:
    assert len(corpus) == len(GROUPS)
    for index, one in enumerate(GROUPS):
        chosen = range(len(one.responses))
        expected = encoder.encode([(one.instruction, response) for response in one.responses])
        assert corpus.pairs(index, chosen) == expected
        assert corpus.max_tokens(index, chosen) == max(len(pair.ids) for pair in expected) <= corpus.longest_pair
        assert corpus.labels(index, chosen) == list(one.labels)
        assert corpus.sources(index, chosen) == [one.sources[i] for i in chosen]
        assert corpus.selectable(index) == [i for i in chosen if one.selectable[i]]
        assert corpus.name(index) == f"id {index}é"


@pytest.mark.parametrize("size", [1, 2, 3, 23, 1000, 65_537])
def test_an_order_holds_every_row_once_and_another_key_gives_another(size: int) -> None:
    places = np.arange(size, dtype=np.uint64)
    order = permute(places, size, "0 0")
    assert sorted(order.tolist()) == list(range(size))
    if size > 3:
        assert order.tolist() != permute(places, size, "0 1").tolist()


def test_an_order_needs_no_memory_for_rows_that_nobody_asked_for() -> None:
    size = 10**12
    result = permute(np.array([0, 1, size - 1], dtype=np.uint64), size, "key")
    assert len(set(result.tolist())) == 3
    assert max(result.tolist()) < size


def test_every_row_is_as_likely_at_every_place() -> None:
    counts = Counter(int(permute(np.array([3], dtype=np.uint64), 10, str(key))[0]) for key in range(5000))
    assert len(counts) == 10
    assert all(400 < count < 600 for count in counts.values()), counts


def test_a_pass_holds_every_instance_once_and_differs_from_the_next(corpus: Corpus) -> None:
    drawn = [one for update in range(23) for one in draw_batch(corpus, update, 5, 9, seed=1)]
    passes = [[one.index for one in drawn[start : start + 23]] for start in range(0, 115, 23)]
    assert all(sorted(indices) == list(range(23)) for indices in passes)
    assert len({tuple(indices) for indices in passes}) == 5
    assert draw_batch(corpus, 7, 5, 9, seed=1) == drawn[35:40] != draw_batch(corpus, 7, 5, 9, seed=2)


def test_no_more_candidates_are_drawn_than_asked_for_and_others_in_another_pass(corpus: Corpus) -> None:
    drawn = [draw_batch(corpus, epoch, 23, 3, seed=1) for epoch in range(6)]
    assert {len(one.responses) for one in drawn[0]} == {2, 3}
    assert len({one.responses for passed in drawn for one in passed if one.index == 4}) > 1


def test_passes_keep_instances_whole_within_the_budget_and_give_every_rank_work(corpus: Corpus) -> None:
    drawn = draw_batch(corpus, 0, 12, 4, seed=1)
    for budget in (64, 200, 10_000):
        micros = split_batch(drawn, budget)
        assert sorted(one.index for micro in micros for one in micro) == sorted(one.index for one in drawn)
        assert all(len(micro) == 1 or padded_tokens(micro) <= budget for micro in micros)
    assert len(split_batch(drawn, 10_000)) == 1
    assert len(split_batch(drawn, 10_000, min_passes=5)) == 5
    assert len(split_batch(drawn[:3], 10_000, min_passes=5)) == 3


def test_passes_are_shared_out_once_each_and_evenly() -> None:
    costs = [9, 1, 5, 5, 2, 2]
    hands = [assign_passes(costs, rank, 3) for rank in range(3)]
    assert sorted(number for hand in hands for number in hand) == list(range(6))
    assert [sum(costs[number] for number in hand) for hand in hands] == [9, 8, 7]


def test_pools_to_check_hold_what_a_selector_may_pick(corpus: Corpus) -> None:
    drawn = [draw_validation(corpus, index, 3, seed=0) for index in range(len(corpus))]
    assert all(1 <= len(one.responses) <= 3 and 0 not in one.responses for one in drawn)
    assert drawn == [draw_validation(corpus, index, 3, seed=0) for index in range(len(corpus))]
    assert isinstance(drawn[0], DrawnInstance)


def labelled(number: int, split: Split, size: int = 3) -> Instance:
    candidates = tuple(Candidate(response=f"dog {i}", labels={"rougeL": i / 4}) for i in range(size))
    return Instance(
        instance_id=str(number), instruction=f"i {number}", references=("r",), split=split, candidates=candidates
    )


def test_a_folder_is_tokenized_once_and_anew_for_another_folder(
    encoder: PairEncoder, scorer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scorer_folder)
    rows = [labelled(n, ("train", "validation", "test")[n % 3], size=1 + n % 4) for n in range(30)]
    write(tmp_path / "a", rows)
    write(tmp_path / "b", rows[:-3])

    def opened(name: str, encoder: PairEncoder = encoder) -> tuple[int, int, int]:
        result = open_corpora(tmp_path / name, tmp_path / "cache", tokenizer, encoder, metric="rougeL", sources=())
        return len(result.train), len(result.validation), len(result.prompts)

    trainable = sum(len(row.candidates) > 1 for row in rows if row.split == "train")
    assert opened("a") == (trainable, 10, 20)
    folders = set((tmp_path / "cache").glob("[!.]*"))

    class Never(PairEncoder):
        def tokenize(self, texts: list[str]) -> list[list[int]]:
            raise AssertionError

    assert opened("a", Never(tokenizer, LENGTH)) == (trainable, 10, 20)
    assert opened("b")[2] == 18
    assert len(set((tmp_path / "cache").glob("[!.]*")) - folders) == 1


def test_a_build_that_was_killed_is_done_again(encoder: PairEncoder, scorer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scorer_folder)
    write(tmp_path / "in", [labelled(n, "train") for n in range(4)])

    class Dies(PairEncoder):
        def tokenize(self, texts: list[str]) -> list[list[int]]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_corpora(
            tmp_path / "in", tmp_path / "cache", tokenizer, Dies(tokenizer, LENGTH), metric="rougeL", sources=()
        )
    result = open_corpora(tmp_path / "in", tmp_path / "cache", tokenizer, encoder, metric="rougeL", sources=())
    assert len(result.train) == 4
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_sampled_response_outranks_a_mismatch_of_the_same_text_and_labels_must_be_there() -> None:
    both = (
        Candidate(response="x", labels={"rougeL": 0.5}),
        Candidate(response="x", source="mismatch", labels={"rougeL": 0.0}),
    )
    instance = Instance(instance_id="1", instruction="i", references=("r",), candidates=both)
    assert to_training_instance(instance, "rougeL").labels == (0.5,)
    with raises_naming(RecordError, "instance '1'", "'bleu'", "run cappy annotation"):
        to_training_instance(instance, "bleu")


def test_sources_can_be_left_out_and_what_a_selector_may_pick_stays_known() -> None:
    candidates = (
        Candidate(response="r", source="reference", labels={"rougeL": 1.0}),
        Candidate(response="r", labels={"rougeL": 0.9}),
        Candidate(response="x", labels={"rougeL": 0.5}),
        Candidate(response="m", source="mismatch", labels={"rougeL": 0.0}),
    )
    instance = Instance(instance_id="1", instruction="i", references=("r",), candidates=candidates)
    whole = to_training_instance(instance, "rougeL")
    assert (whole.responses, whole.labels, whole.selectable) == (("r", "x", "m"), (1.0, 0.5, 0.0), (True, True, False))
    assert to_training_instance(instance, "rougeL", ("llm",)).responses == ("x",)
    assert to_training_instance(instance, "rougeL", ("reference", "mismatch")).responses == ("r", "m")


def test_memory_does_not_grow_with_rows(encoder: PairEncoder, scorer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scorer_folder)
    peaks = []
    for count in (1024, 4096):
        write(tmp_path / str(count), (labelled(n, "train") for n in range(count)))
        tracemalloc.start()
        result = open_corpora(
            tmp_path / str(count), tmp_path / "cache", tokenizer, encoder, metric="rougeL", sources=()
        )
        for update in range(8):
            draw_batch(result.train, update, 16, 2, seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(result.train) == 4096
    assert peaks[1] < 1.2 * peaks[0], peaks
