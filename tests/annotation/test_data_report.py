"""The data report's numbers are those of a plain recount, however the rows come."""

import json
import math
import random
import re
import statistics
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from wording import assert_names, raises_naming

from cappy.annotation.report import DataReport, summarize, to_text, write_page, write_report
from cappy.annotation.report.candidates import COLUMNS, Candidates, Ints, TextColumn, encode_texts, measure_instances
from cappy.annotation.report.data_report_page import render
from cappy.annotation.report.record import QUANTILES, PoolStatistics
from cappy.annotation.report.summary import DistinctHashes, LengthTotals, count_characters, count_words
from cappy.annotation.report.text import MAX_ROWS, WIDTH, to_values
from cappy.annotation.rouge import is_partly_visible
from cappy.annotation.step import AnnotationConfig, run
from cappy.errors import ConfigError, FolderError, RecordError
from cappy.evaluation import evaluate
from cappy.records import Candidate, Instance, prompt_hash, read, read_batches, write
from cappy.records.instance import SOURCES, SPLITS, STATUSES
from cappy.records.schema import SCHEMA, from_batch, to_table

LABELS = (0.0, 1.0, 0.05, 0.5, 1 / 3, 0.95, 1e-12, 1 - 2**-53)
TEXTS = ("", " \n", "yes", "no", "5 猫", "The cat\u00a0sat.", "猫 が\u3000いる", "a" * 3000, "two  words")


def candidate(response: str = "yes", label: float = 0.5, **values: Any) -> Candidate:
    return Candidate(response=response, labels={"m": label}, **values)


def instance(name: str, *candidates: Candidate, **values: Any) -> Instance:
    given = {"instruction": f"say {name}", "references": ("yes",), **values}
    return Instance(instance_id=name, candidates=candidates, **given)


candidates = st.builds(
    candidate,
    response=st.sampled_from(TEXTS),
    label=st.sampled_from(LABELS),
    source=st.sampled_from(SOURCES),
    status=st.sampled_from([*STATUSES, "ok", "ok", "ok"]),
    generator=st.sampled_from(["", "one", "two"]),
    decoding=st.sampled_from(["", "beam4"]),
    logprob_sum=st.sampled_from([None, -1.0]),
)
instances = st.builds(
    Instance,
    instance_id=st.uuids().map(str),
    group_id=st.sampled_from(["", "a", "b"]),
    instruction=st.sampled_from(["Say it.", "say  IT.", "Sag es.", "もう一度"]),
    references=st.lists(st.sampled_from(["yes", "привет", "K", "two words"]), min_size=1, max_size=3).map(tuple),
    task=st.sampled_from(["", "one", "two"]),
    split=st.sampled_from(SPLITS),
    candidates=st.lists(candidates, max_size=6).map(tuple),
)


def batches(given: Sequence[Instance], size: int | None = None) -> Iterable[pa.RecordBatch]:
    return to_table(given).combine_chunks().to_batches(max_chunksize=size)


def report_of(*given: Instance) -> DataReport:
    return summarize(batches(given), "m")


def recounted_pools(given: Sequence[Instance], metric: str) -> dict[str, Any]:
    """`PoolStatistics` by its definition, one candidate after the other."""
    pools, ties = [i.selectable for i in given if i.selectable], []
    result: dict[str, list[float]] = {"random": [], "oracle": [], "no_signal": [], "best_shared": [], "effective": []}
    for pool in pools:
        labels = [c.labels[metric] for c in pool]
        distinct: dict[str, float] = {}
        for c in pool:
            distinct.setdefault(c.response, c.labels[metric])
        shares = [count / len(pool) for count in Counter(c.response for c in pool).values()]
        result["random"].append(sum(labels) / len(labels))
        result["oracle"].append(max(labels))
        result["no_signal"].append(len(set(labels)) == 1)
        result["best_shared"].append(list(distinct.values()).count(max(distinct.values())) > 1)
        result["effective"].append(math.exp(-sum(p * math.log(p) for p in shares)))
        pairs = [one == other for one, other in combinations(distinct.values(), 2)]
        ties += [statistics.mean(pairs)] if pairs else []
    return {
        "instances": len(given),
        "candidates": sum(len(i.candidates) for i in given),
        "selectable": sum(len(i.selectable) for i in given),
        "distinct": sum(len({c.response for c in pool}) for pool in pools),
        "num_pools": len(pools),
        "num_multi_response_pools": len(ties),
        "ties": mean(ties),
        **{name: mean(values) for name, values in result.items()},
    }


def recounted_labels(labels: Sequence[float]) -> dict[str, Any]:
    inside = Counter(int(label * 20) for label in labels if 0 < label < 1)
    bins = tuple(inside[index] for index in range(20))
    return {"zero": labels.count(0), "bins": bins, "one": labels.count(1), "mean": mean(labels)}


def recounted_lengths(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank quantiles."""
    ordered = sorted(lengths)
    result = {str(q): ordered[math.ceil(len(ordered) * q / 100) - 1] for q in QUANTILES}
    return {**result, "max": ordered[-1]}


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def same(result: object, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        assert getattr(result, name) == (value if value is None else pytest.approx(value, abs=1e-9)), name


def check(report: DataReport, given: Sequence[Instance], metric: str) -> None:
    """Every number of the report against its plain recount."""
    every = [c for i in given for c in i.candidates]
    same(report.total, recounted_pools(given, metric))
    for result, key in ((report.tasks, "task"), (report.splits, "split")):
        assert set(result) == {getattr(i, key) for i in given}
        for name, pools in result.items():
            same(pools, recounted_pools([i for i in given if getattr(i, key) == name], metric))
        assert list(result) == sorted(result, key=lambda name: (-result[name].instances, name))
    same(report.labels, recounted_labels([c.labels[metric] for c in every]))
    assert set(report.sources) == {c.source for c in every}
    for source, labels in report.sources.items():
        same(labels, recounted_labels([c.labels[metric] for c in every if c.source == source]))
    llm = [c for c in every if c.source == "llm"]
    assert {(g.generator, g.decoding) for g in report.generators} == {(c.generator, c.decoding) for c in llm}
    for g in report.generators:
        own = [c for c in llm if (c.generator, c.decoding) == (g.generator, g.decoding)]
        same(g.labels, recounted_labels([c.labels[metric] for c in own]))
        assert g.num_blank == sum(not c.response.strip() for c in own)
    assert report.statuses == Counter(c.status for c in llm)
    responses = [c.response for c in every if c.source in ("llm", "choice")]
    assert (report.responses, report.num_blank) == (len(responses), sum(not text.strip() for text in responses))
    check_lengths(report, given, responses)
    for repetition, values in (
        (report.instructions, [prompt_hash(i.instruction) for i in given]),
        (report.groups, [i.group_id for i in given]),
    ):
        splits: dict[Any, set[str]] = {}
        for value, i in zip(values, given, strict=True):
            splits.setdefault(value, set()).add(i.split)
        assert (repetition.values, repetition.distinct) == (len(given), len(splits))
        assert repetition.in_several_splits == sum(len(where) > 1 for where in splits.values())
    seen = [any(re.search("[a-z0-9]", reference.lower()) for reference in i.references) for i in given]
    assert report.invisible_to_rouge_l == seen.count(False)
    partly = [
        any(map(is_partly_visible, (*i.references, *(c.response for c in i.candidates if c.source == "llm"))))
        for i in given
    ]
    assert report.partly_invisible_to_rouge_l == partly.count(True)


def check_lengths(report: DataReport, given: Sequence[Instance], responses: Sequence[str]) -> None:
    texts = {
        "instruction": [i.instruction for i in given],
        "reference": [reference for i in given for reference in i.references],
        "response": responses,
    }
    for name, values in texts.items():
        for result, length in ((report.characters[name], len), (report.words[name], lambda text: len(text.split()))):
            assert result.num_texts == len(values)
            if values:
                assert result.quantiles == pytest.approx(recounted_lengths([length(v) for v in values]), rel=1e-3)


def drawn(count: int) -> list[Instance]:
    """Seeded instances of many tasks, with repeated responses, tied labels and all sources."""
    rng = random.Random(7)
    words = "the cat sat on a mat with no hat été 日本".split()

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(0, 5)))

    def one(index: int) -> Instance:
        pool = [
            candidate(
                text(),
                rng.choice([0.0, 1.0, round(rng.random(), 1), rng.random()]),
                source=rng.choice(SOURCES),
                generator=rng.choice("ab"),
                decoding=rng.choice(["beam4", "topk40"]),
                status=rng.choice(["ok"] * 9 + ["refused"]),
            )
            for _ in range(rng.randint(0, 12))
        ]
        return instance(
            f"i{index}",
            *pool,
            instruction=f"{text()} {rng.randint(0, count)}",
            references=(text() or "привет",),
            task=f"task {rng.randint(0, 6)}",
            group_id=f"g{rng.randint(0, count // 2)}",
            split=rng.choice(SPLITS),
        )

    return [one(index) for index in range(count)]


def test_every_number_is_that_of_a_plain_recount_over_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "data", drawn(1500), part_rows=400)
    report = write_report(tmp_path / "data", tmp_path / "report", "m")
    check(report, list(read(tmp_path / "data")), "m")
    values = json.loads((tmp_path / "report/report.json").read_text())
    assert values["total"]["oracle"] == report.total.oracle
    assert values["total"]["comparable"] == report.total.num_multi_response_pools
    assert values["empty"] == report.num_blank
    assert values["words"]["response"]["texts"] == report.words["response"].num_texts


@given(st.lists(instances, max_size=8))
@settings(deadline=None)
def test_every_number_is_that_of_a_plain_recount_whatever_the_instances(given: list[Instance]) -> None:
    check(report_of(*given), given, "m")


@given(st.lists(instances, min_size=1, max_size=8), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_order_and_batches_of_the_rows_do_not_matter(given: list[Instance], size: int, rng: random.Random) -> None:
    shuffled = rng.sample(given, len(given))
    assert summarize(batches(shuffled, size), "m") == report_of(*given)


def test_not_even_the_last_bit_depends_on_what_else_a_batch_holds() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(5_000), 40)
    column = encode_texts(pa.array(list("abcdefghijkl")))
    which, labels = rng.integers(0, 12, len(owner)), rng.random(len(owner))

    def pools_with(numbers: Ints) -> Ints:
        llm, ok, blank = (
            TextColumn(encode_texts(pa.array([text])).values, np.zeros_like(owner)) for text in ("llm", "ok", "")
        )
        response = TextColumn(column.values, numbers[which])
        fields = {"source": llm, "status": ok, "generator": blank, "decoding": blank, "response": response}
        return measure_instances(Candidates(rows=5_000, owner=owner, labels=labels, **fields))

    assert np.array_equal(pools_with(np.arange(12)), pools_with(rng.permutation(12)))


def test_what_is_null_counts_as_its_default() -> None:
    rows = to_table(drawn(60)).to_pylist()
    for index, row in enumerate(rows):
        row["group_id"] = [None, "", row["group_id"]][index % 3]
        for name, every in (("task", 4), ("split", 5), ("candidates", 7)):
            row[name] = None if index % every == 0 else row[name]
        for number, result in enumerate(row["candidates"] or ()):
            for name, every in (("source", 2), ("status", 3), ("generator", 5), ("decoding", 4)):
                result[name] = None if number % every == 0 else result[name]
    for batch in pa.Table.from_pylist(rows, schema=SCHEMA).to_batches(max_chunksize=25):
        check(summarize([batch], "m"), list(from_batch(batch)), "m")


@pytest.mark.parametrize("labels", [None, [("m", None)], []])
def test_a_null_is_no_label(labels: list[tuple[str, float | None]] | None) -> None:
    rows = to_table([instance("one", candidate(), candidate(), candidate())]).to_pylist()
    rows[0]["candidates"][1]["labels"] = labels
    with raises_naming(RecordError, "candidate 1 ", "'m'", "other candidates", "cappy annotation"):
        summarize(pa.Table.from_pylist(rows, schema=SCHEMA).to_batches(), "m")


def test_parts_do_not_matter(tmp_path: Path) -> None:
    given = drawn(600)
    reports = []
    for rows in (600, 97):
        write(tmp_path / str(rows), given, part_rows=rows)
        reports.append(write_report(tmp_path / str(rows), tmp_path / "report", "m"))
    assert reports[0] == reports[1] == report_of(*given)


def test_memory_does_not_grow_with_rows() -> None:
    (batch,) = batches(drawn(200))

    def peak(times: int) -> int:
        tracemalloc.start()
        summarize((batch for _ in range(times)), "m")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(2)
    # Hashes wait to be merged until there are 4,096 of a split: 80 batches have that many.
    assert peak(240) < peak(80) + 50_000


def test_distinct_values_cost_eight_bytes_each() -> None:
    distinct, rng = DistinctHashes(), np.random.default_rng(0)
    chunks = [rng.integers(0, 2**64, 20_000, dtype=np.uint64) for _ in range(20)]
    for chunk in [*chunks, *chunks]:
        distinct.add(chunk)
    assert len(distinct.hashes()) == len(np.unique(np.concatenate(chunks)))
    assert distinct.hashes().nbytes == 8 * len(distinct.hashes())


def test_random_and_oracle_are_those_of_the_evaluation() -> None:
    given = [replace(i, split="test") for i in drawn(60)]
    evaluated = evaluate(given, score=None, metric="m").selectors
    report = report_of(*given)
    assert report.total.random == pytest.approx(evaluated["random"].estimate.mean, abs=1e-9)
    assert report.total.oracle == pytest.approx(evaluated["oracle"].estimate.mean, abs=1e-9)


@pytest.mark.parametrize(("responses", "effective"), [("aaaa", 1), ("abcd", 4), ("aabb", 2), ("aab", 1.8899)])
def test_effective_candidates_count_equally_frequent_responses(responses: str, effective: float) -> None:
    report = report_of(instance("one", *map(candidate, responses)))
    assert report.total.effective == pytest.approx(effective, abs=1e-4)


def test_ties_are_pairs_of_different_responses_and_pools_weigh_the_same() -> None:
    tied = instance("tied", candidate("a", 0.5), candidate("b", 0.5), candidate("b", 0.5))
    mixed = instance("mixed", candidate("a", 0.1), candidate("b", 0.7), candidate("c", 0.7), candidate("d", 0.2))
    alone = instance("alone", candidate("a", 0.3), candidate("a", 0.3))
    total = report_of(tied, mixed, alone).total
    assert (total.ties, total.num_multi_response_pools) == (pytest.approx((1 + 1 / 6) / 2), 2)
    assert (total.best_shared, total.no_signal) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_what_a_selector_may_not_pick_changes_no_pool() -> None:
    pool = (candidate("a", 0.2), candidate("b", 0.4))
    others = (
        candidate("c", 1.0, source="reference"),
        candidate("d", 0.0, source="mismatch"),
        candidate("e", 0.9, status="refused"),
    )
    alone, beside = (report_of(instance("one", *given)).total for given in (pool, pool + others))
    assert replace(beside, candidates=2) == alone


def test_a_prompt_in_two_splits_is_a_caution() -> None:
    given = [
        instance(split, candidate("a"), instruction=text, split=split)
        for split, text in (("train", "Say it"), ("test", "say  IT"))
    ]
    report = report_of(*given)
    assert (report.instructions.repeats, report.instructions.in_several_splits) == (1, 1)
    assert re.search(r"Caution: 1 of 1 instruction \(100\.0%\).* split", " ".join(to_text(report).split()))


def test_references_that_rouge_l_cannot_see_are_those_that_annotation_counts(tmp_path: Path) -> None:
    texts = ("привет", "hello", "мир 5", "日本", "K", "İ", "ſ", "Éé")
    given = [instance(text, candidate(text), references=(text, "…")) for text in texts]
    write(tmp_path / "source", given)
    manifest = run(AnnotationConfig(source=tmp_path / "source", target=tmp_path / "done", work=tmp_path / "work"))
    report = write_report(tmp_path / "done", tmp_path / "report")
    assert report.metric == "rougeL"
    assert report.invisible_to_rouge_l == 4
    assert report.partly_invisible_to_rouge_l == 2
    assert re.search(r"2 of 8 instances \(25\.0%\).*Rouge-L.* part", to_text(report))
    assert (manifest.metrics["invisible_to_rougeL"], manifest.metrics["partly_invisible_to_rougeL"]) == (4, 2)
    assert re.search(r"4 of 8 instances \(50\.0%\).*Rouge-L", to_text(report))
    assert "Rouge-L" not in to_text(replace(report, metric="rougeL_unicode"))


@given(
    st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.text(" \t\n\x1c\x85\u3000aé", max_size=8))
)
def test_words_and_characters_are_those_of_python(texts: list[str]) -> None:
    column = pa.array(["cut off", *texts], pa.string()).slice(1)
    assert count_words(column).tolist() == [len(text.split()) for text in texts]
    assert count_characters(column).tolist() == [len(text) for text in texts]


@given(st.lists(st.integers(0, 5000) | st.integers(0, 2**40), min_size=1))
def test_quantiles_are_exact_to_2047_and_a_thousandth_too_small_at_most(lengths: list[int]) -> None:
    totals = LengthTotals()
    for length in lengths:
        totals.add(np.array([length]), np.array([1]))
    result, wanted = totals.lengths().quantiles, recounted_lengths(lengths)
    assert result["max"] == wanted["max"]
    for name, length in wanted.items():
        assert (result[name] == length) if length < 2048 else (0.999 * length <= result[name] <= length)


ROBUST = {
    "nothing": [],
    "no candidates": [instance("one"), instance("two")],
    "references alone": [instance("one", candidate("yes", 1.0, source="reference"))],
    "one instance of one response": [instance("one", candidate())],
    "choices alone": [instance("q", *(candidate(t, float(t == "yes"), source="choice") for t in ("yes", "no")))],
    "labels 0": [instance(name, candidate("a", 0.0), candidate("b", 0.0)) for name in "ab"],
    "blank responses": [instance("one", candidate("", 0.0, status="empty"), candidate(" ", 0.0))],
    "one among many empty": [instance("none"), instance("one", candidate("a"), candidate("b", 0.7)), instance("last")],
}


@pytest.mark.parametrize("given", ROBUST.values(), ids=ROBUST.keys())
def test_whatever_is_missing_is_no_number(given: list[Instance], tmp_path: Path) -> None:
    report = report_of(*given)
    check(report, given, "m")
    write_page(report, tmp_path)
    for text in (to_text(report), render(report), (tmp_path / "report.json").read_text()):
        assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", text)


def test_responses_that_cannot_be_picked_are_a_caution() -> None:
    given = [candidate("", 0.0, status="empty"), candidate("no", 0.0, status="refused"), candidate("a"), candidate("b")]
    cautions = [line for line in to_text(report_of(instance("one", *given))).splitlines() if "Caution" in line]
    blank, refused = cautions
    assert_names(blank, "1 of 4 responses (25.0%)", "blank")
    assert_names(refused, "1 of 4 LLM responses (25.0%)", "refused")


def test_equal_labels_throughout_are_the_headline() -> None:
    assert to_text(report_of(*ROBUST["labels 0"])).startswith("Selection cannot gain")
    messages = " ".join(to_text(report_of(*ROBUST["one among many empty"])).split())
    assert_names(messages.split(" - ")[0], "m (×100) is 60.0", "70.0", "up to 10.0.")


def test_the_text_stays_within_its_columns_and_folds_what_is_long() -> None:
    odd = "\x1b[31mred\n" + "名前" * 60
    names = [odd, "very_long_" * 20, *(f"task {index}" for index in range(60))]
    pool = [candidate("a", 0.1, generator=odd), candidate("b", 0.8, generator="x" * 300, decoding="beam4")]
    given = [instance(f"{index}", *pool, task=name) for index, name in enumerate(names)]
    report = report_of(*given)
    huge = PoolStatistics(**{**vars(report.total), "instances": 10**9, "candidates": 10**11, "selectable": 10**11})
    report = replace(report, total=huge, tasks={odd: huge, names[1]: huge, **report.tasks})
    text = to_text(report)
    assert max(map(cell_len, text.splitlines())) <= WIDTH
    assert f"and {len(names) - MAX_ROWS} more tasks" in text
    assert len(re.findall(r"^task \d", text, re.MULTILINE)) == MAX_ROWS - 2
    assert "\x1b" not in text
    values: Any = to_values(report)
    assert len(values["tasks"]) == render(report).count("<td>task ") + 2


def test_texts_of_the_data_cannot_become_markup() -> None:
    attack = "<script>alert(1)</script>"
    pool = [candidate(attack, 0.1, generator=attack), candidate("b", 0.8, decoding=attack)]
    given = [instance(attack, *pool, task=attack, instruction=attack, references=(attack,))]
    renamed = replace(report_of(*given), metric=f"$m$ {attack}")
    html = render(renamed)
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") > 3


def test_the_page_needs_nothing_from_elsewhere_and_equal_reports_make_equal_pages() -> None:
    html = render(report_of(*drawn(30)))
    assert not re.search(r"(src|href)=.(?!#)", html.replace('xlink:href="#', "").replace('href="#', ""))
    assert "url(http" not in html
    assert "@import" not in html
    assert html.count("<svg") == 4
    assert "var(--llm)" in html
    assert html == render(report_of(*drawn(30)))


def test_a_missing_label_is_an_error_that_names_the_metrics_there_are() -> None:
    odd = Candidate(response="b", labels={"chrf": 0.1, "bleu": 0.2})
    given = [instance("one", candidate()), instance("two", candidate(), odd)]
    with raises_naming(RecordError, "instance 'two': candidate 1 ", "'m'", "'bleu', 'chrf'"):
        report_of(*given)
    some = [instance("one", candidate(), Candidate(response="b"))]
    with raises_naming(RecordError, "candidate 1 ", "'m'", "other candidates", "cappy annotation"):
        report_of(*some)
    other = [instance("one", Candidate(response="b"), odd)]
    with raises_naming(RecordError, "candidate 0 ", "'m'", "other candidates", "'bleu', 'chrf'", "cappy annotation"):
        report_of(*other)
    with raises_naming(RecordError, "candidate 0 ", "'m'", "no candidate", "cappy annotation"):
        report_of(instance("one", Candidate(response="b")))


@pytest.mark.parametrize("label", [math.nan, -0.1, 1.5, math.inf])
def test_a_label_that_is_none_is_an_error(label: float) -> None:
    with raises_naming(RecordError, "instance 'one': candidate 1", "'m'", f" {label}", "0 to 1"):
        report_of(instance("one", candidate(), candidate(label=label)))


def test_an_error_is_detected_wherever_the_batch_begins() -> None:
    given = [instance(f"i{index}", candidate(), candidate()) for index in range(9)]
    given[7] = instance("i7", candidate(), Candidate(response="b", labels={"other": 1.0}))
    (batch,) = batches(given)
    with raises_naming(RecordError, "instance 'i7': candidate 1", "'m'", "'other'"):
        summarize([batch.slice(5, 4)], "m")


def test_the_metric_is_the_folders_own_or_must_be_named(tmp_path: Path) -> None:
    write(tmp_path / "plain", drawn(20))
    with pytest.raises(ConfigError, match=r"plain: .*manifest.* 'm'$"):
        write_report(tmp_path / "plain", tmp_path / "report")
    write(tmp_path / "bare", [instance("one", Candidate(response="a"))])
    with raises_naming(ConfigError, "bare: ", "no labels", "cappy annotation"):
        write_report(tmp_path / "bare", tmp_path / "report")
    with pytest.raises(RecordError, match=r"plain: instance 'i\d+': candidate 0 .*'bleu'.*'m'"):
        write_report(tmp_path / "plain", tmp_path / "report", "bleu")
    with raises_naming(FolderError, str(tmp_path), "folders"):
        write_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_columns_of_the_report_are_enough_and_progress_ends_at_all_rows(tmp_path: Path) -> None:
    given = drawn(90)
    write(tmp_path / "data", given, part_rows=40)
    messages: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        messages.append((done, total))

    report = write_report(tmp_path / "data", tmp_path / "report", "m", progress)
    assert messages == [(0, 90), (40, 90), (80, 90), (90, 90)]
    assert report == summarize(read_batches(tmp_path / "data", columns=COLUMNS), "m") == report_of(*given)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.json"]
