"""Labels mean what their source says, and training gets the candidates that it needs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names, raises_naming

from cappy.annotation import rouge_l
from cappy.annotation.labels import MAX_MISMATCH_ROUGE, Labelling, RegressionRow, annotate, regression_rows
from cappy.annotation.metrics import load_metric
from cappy.annotation.rouge import is_partly_visible
from cappy.annotation.step import AnnotationConfig, run
from cappy.cli.steps import summary
from cappy.config import build
from cappy.errors import ConfigError, RecordError
from cappy.records import Candidate, Instance, Manifest, read, read_manifest, write


def generation(name: str, reference: str, *responses: str) -> Instance:
    candidates = tuple(Candidate(response=response) for response in responses)
    return Instance(
        instance_id=name, instruction=f"say {name}", references=(reference,), task="say", candidates=candidates
    )


def labelled(instances: list[Instance], **known: Any) -> dict[str, list[tuple[str, str, float]]]:
    done = annotate(instances, Labelling(name="rougeL", metric=load_metric("rougeL"), **known))
    return {i.instance_id: [(c.response, c.source, c.labels["rougeL"]) for c in i.candidates] for i in done}


def test_each_source_has_its_label() -> None:
    result = labelled([generation("one", "the red cat", "the cat", "dog"), generation("two", "a blue bird")])
    assert result["one"] == [
        ("the red cat", "reference", 1.0),
        ("the cat", "llm", 0.8),
        ("dog", "llm", 0.0),
        ("a blue bird", "mismatch", 0.0),
    ]


def test_a_choice_is_right_or_wrong_and_needs_no_mismatch() -> None:
    instance = Instance(
        instance_id="q",
        instruction="yes or no?",
        references=("yes",),
        choices=("yes", "no"),
        candidates=tuple(Candidate(response=text, source="choice") for text in ("yes", "no")),
    )
    assert labelled([instance])["q"] == [("yes", "choice", 1.0), ("no", "choice", 0.0)]


def test_a_mismatch_is_never_one_of_the_instances_own_texts() -> None:
    for name, candidates in labelled([generation("a", "same"), generation("b", "same")]).items():
        assert [source for _, source, _ in candidates] == ["reference"], name


def test_annotating_twice_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in", [generation(f"i{n}", f"the {n} cats", f"{n} cats") for n in range(9)])
    config = AnnotationConfig(source=tmp_path / "in", target=tmp_path / "once", work=tmp_path / "work", part_rows=3)
    run(config)
    run(AnnotationConfig(source=tmp_path / "once", target=tmp_path / "twice", work=tmp_path / "work", part_rows=3))
    assert list(read(tmp_path / "once")) == list(read(tmp_path / "twice"))


def test_an_unknown_metric_is_named_with_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"annotation: --metric: unknown metric 'meteor'.*rougeL, "):
        build(AnnotationConfig, {"source": tmp_path, "target": tmp_path, "metric": "meteor"})


def test_a_nearly_right_reference_of_another_is_no_mismatch() -> None:
    instances = [generation("a", "the red cat"), generation("b", "the red cats sat"), generation("c", "no")]
    for name, candidates in labelled(instances, mismatches=2).items():
        own = next(instance.references for instance in instances if instance.instance_id == name)
        wrong = [text for text, source, _ in candidates if source == "mismatch"]
        assert wrong
        assert all(rouge_l(own, text) < MAX_MISMATCH_ROUGE for text in wrong)


def test_a_mismatch_comes_from_the_same_task_and_template() -> None:
    instances = [
        replace(generation(f"{task}{template}{n}", f"{task}{template}{n}"), task=task, template=template)
        for task in "xy"
        for template in "pq"
        for n in range(5)
    ]
    for name, candidates in labelled(instances, mismatches=3).items():
        wrong = [text for text, source, _ in candidates if source == "mismatch"]
        assert len(set(wrong)) == 3
        assert all(text.startswith(name[:2]) for text in wrong)


def test_the_draw_of_mismatches_hangs_on_the_seed_alone() -> None:
    instances = [generation(str(n), f"answer{n}") for n in range(40)]
    assert labelled(instances, seed=1) == labelled(instances, seed=1)
    assert labelled(instances, seed=1) != labelled(instances, seed=2)


def test_the_paper_preset_repeats_the_published_set_with_its_quirks() -> None:
    twice = Instance(instance_id="t", instruction="say t", references=("same", "same"), task="say")
    result = labelled([twice, generation("u", "other", "same", "other", "")], preset="paper")
    # One draw for each reference; one that is a text of the instance is dropped and not drawn again. A repeated
    # reference stays, and a mismatch stands before what was sampled, so that its label wins.
    assert [row for row in result["t"] if row[1] == "reference"] == [("same", "reference", 1.0)] * 2
    assert [text for text, source, _ in result["t"] if source == "mismatch"] in ([], ["other"])
    wins = {}
    for seed in range(20):
        instance = generation("u", "other", "same", "other", "")
        (_, done) = annotate(
            [twice, instance], Labelling(name="rougeL", metric=load_metric("rougeL"), preset="paper", seed=seed)
        )
        rows = [(row.response, row.source, row.label) for row in regression_rows(done, "rougeL")]
        wins[tuple(rows)] = seed
    start, end = ("other", "reference", 1.0), ("", "llm", 0.0)
    # "other" was sampled too, but stands as the reference; "same" is the mismatch where one was drawn.
    assert set(wins) == {(start, ("same", "mismatch", 0.0), end), (start, ("same", "llm", 0.0), end)}


def test_rows_drop_duplicates_and_keep_where_each_came_from() -> None:
    labels = {"rougeL": 0.25}
    instance = Instance(
        instance_id="i",
        instruction="go",
        references=("a",),
        candidates=(
            Candidate(response="a", source="reference", labels={"rougeL": 1.0}),
            Candidate(response="a", labels={"rougeL": 0.9}),
            Candidate(response="b", generator="g", decoding="beam4", labels=labels),
            Candidate(response="b", source="mismatch", labels={"rougeL": 0.0}),
        ),
    )
    common: dict[str, Any] = {"instance_id": "i", "instruction": "go"}
    assert list(regression_rows(instance, "rougeL")) == [
        RegressionRow(response="a", label=1.0, source="reference", **common),
        RegressionRow(response="b", label=0.25, source="llm", generator="g", decoding="beam4", **common),
    ]


def test_given_labels_need_no_reference_and_none_may_miss(tmp_path: Path) -> None:
    def rated(*labels: float | None) -> Instance:
        return Instance(
            instance_id="i",
            instruction="rate",
            references=(),
            candidates=tuple(
                Candidate(response=f"r{n}", labels={} if label is None else {"given": label})
                for n, label in enumerate(labels)
            ),
        )

    write(tmp_path / "in", [rated(0.25, 1.0)])
    config = AnnotationConfig(source=tmp_path / "in", target=tmp_path / "out", work=tmp_path / "work", metric="given")
    run(config)
    (done,) = read(tmp_path / "out")
    assert [(candidate.source, candidate.labels) for candidate in done.candidates] == [
        ("llm", {"given": 0.25}),
        ("llm", {"given": 1.0}),
    ]
    with raises_naming(RecordError, "instance 'i': ", "response 'r1'", "label", "--metric"):
        list(annotate([rated(0.5, None)], Labelling(name="given", metric=load_metric("given"))))


def test_shards_and_workers_change_nothing_of_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "in", [generation(f"i{n}", f"the {n} cats", f"{n} cats") for n in range(40)], part_rows=7)

    def annotated(name: str, **known: Any) -> Manifest:
        return run(
            AnnotationConfig(
                source=tmp_path / "in", target=tmp_path / name, work=tmp_path / f"work-{name}", part_rows=10, **known
            )
        )

    assert annotated("one") == annotated("two", workers=2)
    shards = [annotated(f"shard{n}", shard=f"{n}/4") for n in range(4)]
    assert [manifest.rows for manifest in shards] == [10] * 4
    assert [i for n in range(4) for i in read(tmp_path / f"shard{n}")] == list(read(tmp_path / "one"))


def test_what_rouge_l_cannot_see_and_mismatches_missing_are_counted(tmp_path: Path) -> None:
    instances = [generation("r", "привет"), generation("s", "cat"), generation("t", "日本"), generation("u", "cat")]
    write(tmp_path / "in", [*instances, replace(generation("alone", "x"), task="alone")])
    run(AnnotationConfig(source=tmp_path / "in", target=tmp_path / "out", work=tmp_path / "work", part_rows=2))
    metrics = read_manifest(tmp_path / "out").metrics
    assert {name: metrics[name] for name in ("invisible_to_rougeL", "mismatches_missing")} == {
        "invisible_to_rougeL": 2,
        "mismatches_missing": 1,
    }
    # Counted once, also where the parts are there already.
    run(AnnotationConfig(source=tmp_path / "in", target=tmp_path / "again", work=tmp_path / "work", part_rows=2))
    assert read_manifest(tmp_path / "again").metrics == metrics


@pytest.mark.parametrize(
    ("text", "partly"),
    [
        ("2008年北京奥运会", True), ("iPhone 15 発売", True), ("naïve", True), ("5 m²", True), ("e\u0301te", True),
        ("COVID-19 пандемия", True), ("हिन्दी 5", True), ("３ cats", True), ("İstanbul", True),
        ("the cat", False), ("", False), ("привет", False), ("日本", False), ("“the” cat – 5 €, ok…", False),
        ("5 → 6 😀", False),
        ("\u212aelvin", False),
    ],
)  # fmt: skip
def test_what_rouge_l_sees_only_a_part_of_is_counted_and_said(tmp_path: Path, text: str, partly: bool) -> None:
    """C11: whether it stands in a reference or in a response; the label stays rouge_score's."""
    assert is_partly_visible(text) == partly
    others = [generation(str(n), f"cat {n}", f"cats {n}") for n in range(3)]
    for name, own in (("reference", generation("x", text or "cat", "dog")), ("response", generation("x", "dog", text))):
        write(tmp_path / name, [*others, own])
        config = AnnotationConfig(source=tmp_path / name, target=tmp_path / f"{name}-out", work=tmp_path / "work")
        manifest = run(config)
        assert manifest.metrics.get("partly_invisible_to_rougeL", 0) == partly
        cautions = [str(line) for line in manifest.facts.get("cautions", ()) if "[a-z0-9]" in str(line)]
        assert len(cautions) == partly
        for line in cautions:
            assert_names(line, "1 of 4 (25.0 %)", "Rouge-L", "--metric rougeL_unicode or chrf")
            assert f"caution   {line}" in summary(manifest, config.target, 1.0)


def test_other_metrics_do_not_count_what_rouge_l_sees(tmp_path: Path) -> None:
    write(tmp_path / "in", [generation("x", "2008年北京奥运会", "2008年上海世博会")])
    result = {}
    for metric in ("rougeL", "chrf", "rougeL_unicode", "0.5*rougeL+0.5*chrf"):
        config = AnnotationConfig(
            source=tmp_path / "in", target=tmp_path / metric, work=tmp_path / "work", metric=metric, mismatches=0
        )
        result[metric] = (
            run(config).metrics.get("partly_invisible_to_rougeL"),
            next(read(config.target)).candidates[1],
        )
    assert [count for count, _ in result.values()] == [1, None, None, 1]
    labels = [candidate.labels[metric] for metric, (_, candidate) in result.items()]
    assert labels[0] == 1.0, "rouge_score's own value"
    assert max(labels[1:3]) < 0.7


@pytest.mark.parametrize(
    "response",
    [
        "<think>It could be Rome.</think>Paris", "<think>\nIt could be Rome", "It could be Rome.</think>\nParis",
        "<thinking>Rome?</thinking>Paris", "<reasoning>Rome?</reasoning> Paris", "[THINK]Rome?[/THINK]Paris",
        "<|channel|>analysis<|message|>Rome?<|end|><|start|>assistant<|channel|>final<|message|>Paris",
    ],
)  # fmt: skip
@pytest.mark.parametrize("metric", ["rougeL", "exact_match", "given"])
def test_reasoning_in_responses_is_counted_and_said_once(tmp_path: Path, response: str, metric: str) -> None:
    """C10: whatever the metric; only in LLMs' responses."""
    given = [
        replace(
            generation(str(n), "Paris <think>", *(response if n == k == 0 else f"Rome {n} {k}" for k in range(4))),
            candidates=tuple(
                Candidate(response=response if n == k == 0 else f"Rome {n} {k}", labels={"given": 0.5})
                for k in range(4)
            ),
        )
        for n in range(5)
    ]
    write(tmp_path / "in", given)
    config = AnnotationConfig(
        source=tmp_path / "in", target=tmp_path / "out", work=tmp_path / "work", part_rows=2, metric=metric
    )
    manifest = run(config)
    assert (manifest.metrics["with_reasoning"], manifest.metrics["responses"]) == (1, 20)
    (line,) = manifest.facts["cautions"]
    assert_names(line, "1 of 20 (5.0 %)", "reasoning", "--strip-reasoning")
    assert summary(manifest, config.target, 1.0).count(line) == 1


def test_what_only_looks_like_reasoning_is_none(tmp_path: Path) -> None:
    write(
        tmp_path / "in", [generation("x", "Paris", "I think Paris", "think > Paris", "x < thinking", "analysis: Paris")]
    )
    manifest = run(AnnotationConfig(source=tmp_path / "in", target=tmp_path / "out", work=tmp_path / "work"))
    assert "with_reasoning" not in manifest.metrics
    assert "cautions" not in manifest.facts


@pytest.mark.parametrize("shard", ["4/4", "1", "-1/2", "1/0", "0/5000", "a/b"])
def test_what_is_no_shard_is_refused(tmp_path: Path, shard: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--shard: '{shard}' .*0/4 to 3/4"):
        build(AnnotationConfig, {"source": tmp_path, "target": tmp_path, "shard": shard})
