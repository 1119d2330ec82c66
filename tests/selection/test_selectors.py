"""Selectors pick by what a user would have, the first of equal values."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from cappy.records import Candidate, Instance
from cappy.selection.pools import (
    Pool,
    choose_decoding,
    choose_system,
    collect_pools,
    greedy_systems,
    is_tied,
    mbr,
    pick,
    system_index,
)
from cappy.selection.selectors import SELECTORS, Fitting

TEXTS = (
    "Blue Spice is a coffee shop in the city centre.",
    "In the city centre there is a coffee shop called Blue Spice .",
    "Blue Spice is situated in the city centre and sells coffee shop style food .",
    "Blue spice is a coffee shop in the city centre.",
    "Ein Café, naïvely named; running runners ran 3.14 times",
    "…",
)


def pool_of(candidates: Sequence[Candidate]) -> Pool:
    instance = Instance(instance_id="i", instruction="i", references=("r",), candidates=tuple(candidates))
    return Pool(instance, instance.candidates, np.zeros(len(candidates)))


def test_mbr_equals_the_mean_rouge_of_each_text_against_the_others() -> None:
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    naive = [
        np.mean([rouge.score(other, text)["rougeL"].fmeasure for j, other in enumerate(TEXTS) if j != i])
        for i, text in enumerate(TEXTS)
    ]
    assert mbr(TEXTS) == pytest.approx(naive, abs=1e-11)


def test_mbr_counts_a_text_as_often_as_it_was_sampled() -> None:
    assert pick(mbr(("a b c", "a b d", "x y z", "x y z"))) == 2


def test_mbr_of_a_lone_or_an_even_pair_is_the_first() -> None:
    assert mbr(("alone",)).tolist() == [0.0]
    one, other = mbr(("one two three", "two three four five"))
    assert one == other


def test_equal_values_pick_the_first() -> None:
    assert pick(np.array([0.1, 0.7, 0.7])) == 1


@pytest.mark.parametrize(
    ("values", "labels", "tied"),
    [([1, 1, 0], [0.5, 0.4, 0.0], True), ([1, 1, 0], [0.5, 0.5, 0.0], False), ([1, 0, 0], [0.5, 0.1, 0.2], False)],
)
def test_a_tie_is_one_that_changes_the_label(values: list[float], labels: list[float], tied: bool) -> None:
    assert is_tied(np.array(values, dtype=float), np.array(labels)) is tied


def test_lengths_are_characters() -> None:
    pool = pool_of([Candidate(response=text) for text in ("four", "a b c d e", "ü")])
    picks = {
        name: pick(SELECTORS[name].fit(Fitting(held_out=[], pools=[pool])).values(pool))
        for name in ("longest", "shortest", "first")
    }
    assert picks == {"longest": 1, "shortest": 2, "first": 0}


def test_likelihood_needs_every_candidates_logprob() -> None:
    candidates = [Candidate(response="a", logprob_sum=-2, logprob_mean=-1), Candidate(response="b", logprob_sum=-1)]
    pool = pool_of(candidates)
    assert pool.likelihood_sum is not None
    assert pick(pool.likelihood_sum) == 1
    assert pool.likelihood_mean is None


@pytest.mark.parametrize("impossible", [math.nan, -math.inf, -1e200])
def test_what_is_no_log_probability_counts_as_missing(impossible: float) -> None:
    pool = pool_of([Candidate(response="a", logprob_mean=-1.0), Candidate(response="b", logprob_mean=impossible)])
    assert pool.likelihood_mean is None


def test_a_system_is_its_first_candidate() -> None:
    pool = pool_of([Candidate(response=str(i), generator="g", decoding=d) for i, d in enumerate(("x", "y", "y"))])
    assert system_index(pool, "g y") == 1
    assert system_index(pool, "g z") is None
    assert system_index(pool_of([Candidate(response="a")]), "") is None


def test_the_single_decoding_is_the_greedy_one_even_if_another_is_better() -> None:
    def instance(index: int, decodings: dict[str, float]) -> Instance:
        candidates = tuple(
            Candidate(response=name, generator="g", decoding=name, labels={"rougeL": label})
            for name, label in decodings.items()
        )
        return Instance(instance_id=str(index), instruction="i", references=("r",), candidates=candidates)

    rows = [{"topk": 0.9, "temperature0": 0.3}, {"topk": 0.8, "temperature0": 0.4}]
    pools = collect_pools([instance(i, row) for i, row in enumerate(rows)], metric="rougeL", splits={"train"})
    assert greedy_systems(pools) == {"g temperature0"}
    assert choose_decoding(pools) == "g temperature0"
    without = collect_pools([instance(2, {"topk": 0.5, "beam": 0.4})], metric="rougeL", splits={"train"})
    assert choose_decoding([*pools, *without]) == "g topk"
    assert greedy_systems([]) == set()
    # A few failed requests do not make another decoding the greedy one.
    failed = collect_pools([instance(3, {"topk": 0.5})], metric="rougeL", splits={"train"})
    assert choose_decoding([*(pools * 5), *failed]) == "g temperature0"


def test_a_system_that_gave_several_responses_is_no_single_decoding() -> None:
    def pool(*decodings: str) -> Pool:
        return pool_of([Candidate(response=str(i), generator="g", decoding=name) for i, name in enumerate(decodings)])

    assert choose_decoding([pool("topp", "topp"), pool("topp", "topp")]) is None
    assert choose_decoding([pool("topp", "beam"), pool("topp", "topp")]) == "g beam"


def test_the_best_system_has_the_best_mean_label_and_not_one_lucky_one() -> None:
    def instance(index: int, labels: dict[str, float]) -> Instance:
        candidates = tuple(Candidate(response=n, generator=n, labels={"rougeL": v}) for n, v in labels.items())
        return Instance(instance_id=str(index), instruction="i", references=("r",), candidates=candidates)

    rows = [{"weak": 0.1, "good": 0.6}, {"weak": 0.2, "good": 0.7}, {"weak": 0.1, "good": 0.5, "lucky": 0.9}]
    pools = collect_pools([instance(i, row) for i, row in enumerate(rows)], metric="rougeL", splits={"train"})
    assert choose_system(pools) == "good"


def test_references_and_planted_candidates_are_never_in_a_pool() -> None:
    sources = ("reference", "llm", "mismatch", "choice", "llm")
    candidates = [Candidate(response=s, source=s, labels={"rougeL": 1.0}) for s in sources]  # type: ignore[arg-type]
    candidates[-1] = replace(candidates[-1], status="failed")
    instance = Instance(instance_id="i", instruction="i", references=("r",), candidates=tuple(candidates))
    (pool,) = collect_pools([instance], metric="rougeL", splits={"train"})
    assert pool.responses == ("llm", "choice")
