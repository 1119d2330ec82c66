"""Samples that an LLM gave earlier take the place of an LLM: the same draws however they are asked for."""

import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wording import assert_names, raises_naming

from cappy.cli.steps import summary
from cappy.config import build
from cappy.errors import CappyError, ConfigError
from cappy.preparation.step import PreparationConfig
from cappy.preparation.step import run as prepare
from cappy.records import Candidate, Instance, Manifest, read, read_manifest, write
from cappy.sampling import load_generator, recorded
from cappy.sampling.estimate import describe, estimate, to_values
from cappy.sampling.step import SamplingConfig, endpoint_config, run
from pipelines.definitions import PIPELINES

Row = dict[str, Any]
Run = Callable[..., tuple[Manifest, dict[str, tuple[Candidate, ...]]]]
PROMPTS = [f"Say {n}." for n in range(7)]
DECODINGS = (("greedy", 1), ("topp0.95", 3))
ALL = [(name, number) for name, count in DECODINGS for number in range(count)]


def sample_rows(prompts: Sequence[str] = PROMPTS, model: str = "m") -> list[Row]:
    """One row for each sample, in a random order, each with its number."""
    rows = [
        {
            "prompt": prompt,
            "response": f"{prompt} {name} {number}",
            "decoding": name,
            "sample": number,
            "logprob_sum": -2.0 - number,
            "num_tokens": 4,
            "model": model,
        }
        for prompt in prompts
        for name, number in ALL
    ]
    random.Random(0).shuffle(rows)
    return rows


def instance_rows(prompts: Sequence[str] = PROMPTS) -> list[Row]:
    """One row for each prompt with its samples, in the form that preparation imports too."""
    return [
        {
            "instruction": prompt,
            "references": ["x"],
            "candidates": [
                {"text": f"{prompt} {name} {n}", "system": f"m {name}", "logprob_mean": (-2.0 - n) / 4, "num_tokens": 4}
                for name, n in ALL
            ],
        }
        for prompt in prompts
    ]


def write_lines(path: Path, rows: Sequence[Row]) -> str:
    """Writes the rows and returns the spec of the file."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packs: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
    pack = packs.get(path.suffix)
    path.write_bytes(pack(data) if pack else data)
    return f"recorded:{path}"


@pytest.fixture
def sample(tmp_path: Path) -> Run:
    """sample(*specs, prompts=..., **settings): the manifest, and the candidates by instruction."""

    def sampled(
        *specs: str, prompts: Sequence[str] = PROMPTS, **settings: Any
    ) -> tuple[Manifest, dict[str, tuple[Candidate, ...]]]:
        number = len(list(tmp_path.glob("given*")))
        write(tmp_path / f"given{number}", instances(prompts))
        paths = {"source": tmp_path / f"given{number}", "target": tmp_path / f"out{number}", "work": tmp_path / "work"}
        progress = settings.pop("progress", lambda *_, **__: None)
        config = SamplingConfig(**{**paths, "generator": specs, **settings})
        manifest = run(config, progress)
        return manifest, {one.instruction: one.candidates for one in read(config.target)}

    return sampled


def instances(prompts: Sequence[str] = PROMPTS) -> list[Instance]:
    return [Instance(instance_id=prompt, instruction=prompt, references=("x",)) for prompt in prompts]


def test_sample_k_of_a_decoding_is_the_kth_that_was_recorded_with_its_likelihood(tmp_path: Path, sample: Run) -> None:
    path = tmp_path / "s.jsonl"
    manifest, drawn = sample(write_lines(path, sample_rows()))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for prompt in PROMPTS:
        assert list(drawn[prompt]) == [
            Candidate(
                response=f"{prompt} {name} {number}",
                generator="m",
                revision=sha256,
                decoding=name,
                logprob_sum=-2.0 - number,
                logprob_mean=(-2.0 - number) / 4,
                num_tokens=4,
            )
            for name, number in sorted(ALL, key=lambda each: drawn_order(drawn[prompt], each[0]))
        ]
    assert manifest.generators == {f"recorded:{path}": sha256}
    assert manifest.metrics["sampled"] == len(PROMPTS) * len(ALL)


def drawn_order(candidates: Sequence[Candidate], decoding: str) -> int:
    """The place of a decoding: that of its first sample in the file."""
    return next(index for index, one in enumerate(candidates) if one.decoding == decoding)


@pytest.mark.parametrize(
    "form", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.xz", "rows.json", "rows.parquet", "folder"]
)
def test_every_form_of_a_record_gives_the_same_draws(tmp_path: Path, sample: Run, form: str) -> None:
    expected = without_revisions(sample(write_lines(tmp_path / "expected.jsonl", instance_rows()))[1])
    path = tmp_path / form
    if form == "folder":
        sample(f"recorded:{tmp_path / 'expected.jsonl'}", target=path)
    elif form == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(instance_rows()), path)
    elif form == "rows.json":
        path.write_text(json.dumps(instance_rows(), indent=1))
    else:
        write_lines(path, sorted(sample_rows(), key=lambda row: (row["decoding"], row["prompt"])))
    assert without_revisions(sample(f"recorded:{path}")[1]) == expected


def without_revisions(drawn: Mapping[str, Sequence[Candidate]]) -> dict[str, list[Candidate]]:
    return {prompt: [replace(one, revision="") for one in candidates] for prompt, candidates in drawn.items()}


def test_the_draws_do_not_depend_on_order_parts_and_shards(tmp_path: Path, sample: Run) -> None:
    spec = write_lines(tmp_path / "s.jsonl.gz", sample_rows())
    expected = sample(spec)[1]
    assert sample(spec, prompts=PROMPTS[::-1], part_rows=2)[1] == expected
    shards = [sample(spec, shard=f"{index}/3", part_rows=1)[1] for index in range(3)]
    assert {prompt: drawn for shard in shards for prompt, drawn in shard.items()} == expected
    generator = load_generator(spec)
    alone = [generator.sample([prompt], generator.decodings, seed=9)[0] for prompt in PROMPTS]  # type: ignore[attr-defined]
    assert alone == [list(expected[prompt]) for prompt in PROMPTS]


def test_a_killed_run_continues_and_its_result_is_the_same(tmp_path: Path, sample: Run) -> None:
    spec = write_lines(tmp_path / "s.jsonl", sample_rows())

    def interrupt(done: int, total: int | None = None, **_: Any) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    expected = sample(spec, work=tmp_path / "other", part_rows=2)[1]
    with pytest.raises(KeyboardInterrupt):
        sample(spec, part_rows=2, progress=interrupt)
    resumed: list[int] = []

    def watch(*_: Any, **values: Any) -> None:
        resumed.append(values.get("resumed", 0))

    manifest, drawn = sample(spec, part_rows=2, progress=watch)
    assert drawn == expected
    assert manifest.rows == len(PROMPTS)
    assert max(resumed) >= 2, "the first part is not sampled again"


def test_another_content_of_the_file_is_other_work(tmp_path: Path, sample: Run) -> None:
    spec = write_lines(tmp_path / "s.jsonl", sample_rows())
    before, _ = sample(spec)
    write_lines(tmp_path / "s.jsonl", [{**row, "response": "changed"} for row in sample_rows()])
    after, drawn = sample(spec)
    assert {one.response for one in drawn[PROMPTS[0]]} == {"changed"}
    assert before.generators != after.generators
    assert len(list((tmp_path / "work" / "sampling").iterdir())) == 2


def test_two_records_are_one_pool_and_each_candidate_says_whose_it_is(tmp_path: Path, sample: Run) -> None:
    specs = [write_lines(tmp_path / f"{name}.jsonl", sample_rows(model="same")) for name in "ab"]
    with pytest.raises(ConfigError, match="have the same samples; remove one"):
        sample(*specs)
    specs[1] = write_lines(
        tmp_path / "b.jsonl",
        [{**row, "sample": 2 - row["sample"]} for row in sample_rows() if row["decoding"] != "greedy"],
    )
    manifest, drawn = sample(*specs)
    first, second = (hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest() for name in "ab")
    assert manifest.generators == {specs[0]: first, specs[1]: second}
    assert manifest.metrics["sampled"] == len(PROMPTS) * 7
    for prompt in PROMPTS:
        own = [one for one in drawn[prompt] if one.revision == second]
        assert [one.response[-1] for one in own] == ["2", "1", "0"]
        assert {one.generator for one in drawn[prompt] if one.revision == first} == {"same"}


def test_an_llm_and_a_record_are_one_pool_each_with_its_own_default(
    tmp_path: Path, sample: Run, llm_folder: Path
) -> None:
    spec = write_lines(tmp_path / "s.jsonl", sample_rows())
    _, drawn = sample(spec, str(llm_folder), prompts=PROMPTS[:1])
    assert [one.generator for one in drawn[PROMPTS[0]]] == ["m"] * 4 + [str(llm_folder)] * 18


def test_prompts_without_samples_are_refused_before_anything_is_written(tmp_path: Path, sample: Run) -> None:
    spec = write_lines(tmp_path / "s.jsonl", sample_rows())
    with raises_naming(
        ConfigError, f"{spec}: ", "no samples for 2 of 9 prompts", "'Say 0. '", "leave their instances out"
    ):
        sample(spec, prompts=[*PROMPTS, "Say 0. ", "Sing."], part_rows=1)
    assert not (tmp_path / "out0").exists()
    assert not (tmp_path / "work" / "sampling").exists()


def test_a_strategy_draws_the_first_samples_and_is_refused_where_there_are_fewer(tmp_path: Path, sample: Run) -> None:
    spec = write_lines(tmp_path / "s.jsonl", sample_rows())
    _, drawn = sample(spec, strategy="topp0.95x2+greedy")
    assert [one.response for one in drawn["Say 0."]] == [
        f"Say 0. {each}" for each in ("topp0.95 0", "topp0.95 1", "greedy 0")
    ]
    with raises_naming(
        ConfigError, f"{spec}: ", "has 3 samples of topp0.95 for 7 of 7 prompts, the strategy asks for 8", "1 of greedy"
    ):
        sample(spec, strategy="topp0.95x8")
    with raises_naming(ConfigError, f"{spec}: ", "no samples of topk40", "3 of topp0.95", "leave --strategy out"):
        sample(spec, strategy="greedy+topk40x4")
    assert not (tmp_path / "out2").exists()


def test_prompts_with_fewer_samples_give_what_they_have_unless_a_strategy_asks_for_more(
    tmp_path: Path, sample: Run
) -> None:
    rows = [row for row in sample_rows() if row["prompt"] != "Say 3." or row["sample"] == 0]
    spec = write_lines(tmp_path / "s.jsonl", rows)
    manifest, drawn = sample(spec)
    assert {prompt: len(candidates) for prompt, candidates in drawn.items()} == {
        **dict.fromkeys(PROMPTS, 4),
        "Say 3.": 2,
    }
    (caution,) = manifest.facts["cautions"]
    assert caution in summary(manifest, tmp_path, 1.0)
    assert_names(caution, "1 sample of topp0.95 for 1 of 7 prompts", "3 for the others")
    with pytest.raises(ConfigError, match="has 1 sample of topp0.95 for 1 of 7 prompts, the strategy asks for 3"):
        sample(spec, strategy="topp0.95x3")


def test_a_sample_that_is_recorded_again_counts_once(tmp_path: Path, sample: Run) -> None:
    spec = write_lines(tmp_path / "s.jsonl", [*instance_rows(), *instance_rows(PROMPTS[:2])])
    manifest, drawn = sample(spec)
    assert {len(candidates) for candidates in drawn.values()} == {4}
    assert "cautions" not in manifest.facts
    other = [{**row, "response": "other"} for row in sample_rows(PROMPTS[:2])]
    manifest, drawn = sample(write_lines(tmp_path / "t.jsonl", [*sample_rows(), *other]))
    assert all(one.response.startswith(prompt) for prompt, candidates in drawn.items() for one in candidates)
    (caution,) = manifest.facts["cautions"]
    assert_names(caution, "8 samples are recorded again with another response", "the first")


def test_rows_of_several_samples_that_a_log_appends_are_all_drawn(tmp_path: Path, sample: Run) -> None:
    def row(*texts: str) -> Row:
        return {"prompt": PROMPTS[0], "candidates": [{"text": text, "decoding": "topp0.95"} for text in texts]}

    rows = [row("a", "b"), row("c"), row("a", "b"), row("d", "e")]
    _, drawn = sample(write_lines(tmp_path / "s.jsonl", rows), prompts=PROMPTS[:1])
    assert [one.response for one in drawn[PROMPTS[0]]] == ["a", "b", "c", "d", "e"]


def test_samples_without_numbers_and_names_are_taken_in_the_order_of_the_file(tmp_path: Path, sample: Run) -> None:
    rows = [{"instruction": prompt, "text": f"{number}"} for number in range(3) for prompt in PROMPTS]
    manifest, drawn = sample(write_lines(tmp_path / "s.jsonl", rows))
    for candidates in drawn.values():
        assert [(one.response, one.generator, one.decoding) for one in candidates] == [
            (str(number), "recorded:s.jsonl", "recorded") for number in range(3)
        ]
    assert str(tmp_path) not in json.dumps([one.generator for one in drawn[PROMPTS[0]]])
    assert manifest.metrics["sampled"] == 21


@pytest.mark.parametrize(
    ("fields", "generator", "decoding"),
    [
        ({"system": "flan t5 beam4"}, "flan t5", "beam4"),
        ({"system": "flan t5"}, "flan t5", "recorded"),
        ({"system": "m temperature0"}, "m", "temperature0"),
        ({"generator": "m greedy", "decoding": "mine"}, "m greedy", "mine"),
        ({"decoding": "topk40"}, "recorded:s.jsonl", "topk40"),
        ({"system": "greedy"}, "recorded:s.jsonl", "greedy"),
    ],
)
def test_a_system_is_a_model_and_where_it_ends_in_one_a_decoding(
    tmp_path: Path, fields: Row, generator: str, decoding: str
) -> None:
    spec = write_lines(tmp_path / "s.jsonl", [{"prompt": "p", "candidates": [{"text": "a", **fields}]}])
    loaded = load_generator(spec)
    ((one,),) = loaded.sample(["p"], loaded.decodings, seed=0)  # type: ignore[attr-defined]
    assert (one.generator, one.decoding) == (generator, decoding)


def test_statuses_are_kept_and_a_blank_response_is_empty(tmp_path: Path, sample: Run) -> None:
    texts = [("a", "truncated"), (" ", "ok"), (" ", None), ("", "refused"), ("b", None)]
    items = [{"text": text, **({"status": status} if status else {})} for text, status in texts]
    spec = write_lines(tmp_path / "s.jsonl", [{"prompt": "p", "candidates": items}])
    manifest, drawn = sample(spec, prompts=["p"])
    assert [one.status for one in drawn["p"]] == ["truncated", "empty", "empty", "refused", "ok"]
    (caution,) = manifest.facts["cautions"]
    assert_names(caution, "1 of 5 responses (20.0 %) were truncated when they were recorded")


BAD_ROWS: list[tuple[Any, tuple[str, ...]]] = [
    ({"response": "a"}, ("no prompt", "'response'", "instruction or prompt")),
    ({"prompt": " ", "response": "a"}, ("no prompt",)),
    ({"prompt": "p"}, ("no response", "'prompt, instruction'", "candidates")),
    ({"prompt": "p", "response": "a", "candidates": [{"text": "a"}]}, ("candidates", "one response in each row")),
    ({"prompt": "p", "candidates": "a"}, ("candidates", "'a'", "list of objects")),
    ({"prompt": "p", "candidates": ["a"]}, ("candidates[0]", "'a'", "object with text")),
    ({"prompt": "p", "candidates": [{"system": "m"}]}, ("candidates[0]", "no text", "'system'")),
    ({"prompt": "p", "response": "a", "status": "fine"}, ("status", "'fine'", "truncated")),
    ({"prompt": "p", "response": "a", "logprob_sum": "-1"}, ("logprob_sum", "finite number", "'-1'")),
    ({"prompt": "p", "response": "a", "sample": -1}, ("sample", "-1", "0 or more")),
    ({"prompt": "p", "response": "a", "sample": 1.5}, ("sample", "1.5", "integer")),
    ({"prompt": "p", "response": "a", "model": "m\nn"}, (r"'m\nn'", "cannot name")),
    ({"prompt": "p", "response": "a"}, ("no number in the field sample", "s.jsonl:1 ", "or none")),
    ([1], ("must be a JSON object",)),
]


@pytest.mark.parametrize(("row", "parts"), BAD_ROWS)
def test_a_bad_row_is_one_line_with_the_row_and_the_remedy(
    tmp_path: Path, sample: Run, row: Any, parts: tuple[str, ...]
) -> None:
    path = tmp_path / "s.jsonl"
    spec = write_lines(path, [sample_rows()[0], row])
    with raises_naming(CappyError, f"{path}:2", *parts) as caught:
        sample(spec)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work" / "sampling").exists()


def test_files_that_are_no_samples_are_refused_with_what_is_wanted(tmp_path: Path, sample: Run) -> None:
    (tmp_path / "s.csv").write_text("prompt,response\np,a\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    wrong = {"s.csv": "CSV", "empty.jsonl": "no samples", "none.jsonl": "cannot be read", "folder": "cannot be read"}
    for name, problem in wrong.items():
        with pytest.raises(CappyError, match=problem):
            sample(f"recorded:{tmp_path / name}")
    with pytest.raises(ConfigError, match="recorded:FILE"):
        SamplingConfig(source=tmp_path, target=tmp_path / "t", generator=("recorded:",))


def test_fields_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "p", "response": "a", "human": 3, "references": ["x"], "task": "t"}
    load_generator(write_lines(tmp_path / "s.jsonl", [row]))
    assert_names(caplog.text, "not read: 'human'")


def test_a_limit_of_tokens_is_refused_where_it_would_change_nothing(tmp_path: Path) -> None:
    values = {"source": tmp_path, "target": tmp_path / "t", "max_new_tokens": 9}
    with raises_naming(ConfigError, "sampling: --max-new-tokens 9 ", "recorded", "leave it out"):
        build(SamplingConfig, {**values, "generator": ("recorded:a.jsonl",)})
    build(SamplingConfig, {**values, "generator": ("recorded:a.jsonl", "builtin")})


def test_a_file_that_only_a_cluster_sees_is_not_asked_for_before_the_step_runs(tmp_path: Path) -> None:
    config = build(
        SamplingConfig, {"source": tmp_path, "target": tmp_path / "t", "generator": ("recorded:/data/s.jsonl",)}
    )
    with raises_naming(ConfigError, "recorded:/data/s.jsonl: cannot be read"):
        assert config.decodings


def test_an_estimate_costs_nothing_and_is_refused_where_the_run_would_be(tmp_path: Path) -> None:
    rows = [row for row in sample_rows() if row["prompt"] != "Say 3." or row["sample"] == 0]
    write(tmp_path / "in", instances())
    spec = write_lines(tmp_path / "s.jsonl", rows)
    values: Row = {"source": tmp_path / "in", "target": tmp_path / "t", "work": tmp_path / "work", "generator": (spec,)}
    config = SamplingConfig(**values)
    (result,) = to_values(estimate(config))
    assert isinstance(result, dict)
    assert (result["candidates"], result["requests"], result["cost"]) == (26, 0, 0)
    assert_names(describe(estimate(config), endpoint_config(config)), "no requests, no cost", "26 candidates")
    with pytest.raises(ConfigError, match="the strategy asks for 8"):
        estimate(SamplingConfig(**values, strategy="topp0.95x8"))


def test_instances_that_have_the_samples_already_are_refused_with_the_remedy_that_works(
    tmp_path: Path, sample: Run
) -> None:
    path = tmp_path / "both.jsonl"
    spec = write_lines(path, instance_rows())
    paths: Row = {"source": str(path), "work": tmp_path / "work", "test": 0, "validation": 0}
    prepare(PreparationConfig(**paths, target=tmp_path / "imported"))
    with raises_naming(ConfigError, f"{spec}: instance ", "has its samples already", "--exclude '*'"):
        sample(spec, source=tmp_path / "imported")
    prepare(PreparationConfig(**paths, target=tmp_path / "bare", exclude=("*",)))
    sample(spec, source=tmp_path / "bare", target=tmp_path / "once")
    assert read_manifest(tmp_path / "once").candidates == len(PROMPTS) * 4
    with pytest.raises(ConfigError, match="has its samples already"):
        sample(spec, source=tmp_path / "once")


@pytest.mark.parametrize("rows", [sample_rows, instance_rows])
def test_in_a_pipeline_one_file_may_hold_the_instances_and_the_samples(
    tmp_path: Path, sample: Run, rows: Callable[[], list[Row]]
) -> None:
    path = tmp_path / "both.jsonl"
    given = [{**row, "instruction": row.get("instruction") or row["prompt"], "references": ["x"]} for row in rows()]
    spec = write_lines(path, given)
    settings = PIPELINES["adapt"].settings({"source": str(path), "generator": [spec]})
    own = {**settings["preparation"], "target": tmp_path / "bare", "work": tmp_path / "work"}
    assert prepare(build(PreparationConfig, own)).rows == len(PROMPTS)
    sample(spec, source=tmp_path / "bare", target=tmp_path / "once")
    for instance in read(tmp_path / "once"):
        assert sorted(one.response for one in instance.candidates) == sorted(
            f"{instance.instruction} {name} {number}" for name, number in ALL
        )
    kept = PIPELINES["adapt"].settings({"source": str(path), "generator": [spec]}, {"preparation": {"exclude": ["n"]}})
    assert kept["preparation"]["exclude"] == ["n"]
    assert "exclude" not in PIPELINES["adapt"].settings({"source": "other.jsonl", "generator": [spec]})["preparation"]


def test_choices_are_not_sampled_for_and_need_no_samples(tmp_path: Path, sample: Run) -> None:
    choices = tuple(Candidate(response=text, source="choice") for text in ("x", "y"))
    closed = Instance(instance_id="c", instruction="Choose.", references=("x",), choices=("x", "y"), candidates=choices)
    write(tmp_path / "mixed", [closed, *instances()])
    rows = [*instance_rows(), {"instruction": "Choose.", "references": ["x"], "choices": ["x", "y"]}]
    spec = write_lines(tmp_path / "s.jsonl", rows)
    sample(spec, source=tmp_path / "mixed", target=tmp_path / "out")
    assert next(read(tmp_path / "out")) == closed


def test_a_large_record_is_on_disk_and_reads_the_same(
    tmp_path: Path, sample: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = without_revisions(sample(write_lines(tmp_path / "small.jsonl", sample_rows()))[1])
    monkeypatch.setattr(recorded, "SPOOL_BYTES", 100)
    assert without_revisions(sample(write_lines(tmp_path / "large.jsonl", sample_rows()))[1]) == expected
