"""The step: candidates appended once, resumed at parts, nothing sampled twice."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import Model, serving

from cappy.errors import ConfigError
from cappy.records import Candidate, Instance, read, write
from cappy.sampling.generators import ignore_progress
from cappy.sampling.statistics import count_part
from cappy.sampling.step import SamplingConfig, run, sample
from cappy.sampling.strategies import GREEDY, STRATEGIES, Decoding


class Echo:
    """Answers with the instruction and the seed, and counts."""

    revision = "1"

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.asked: list[str] = []

    def check(self, decodings: Sequence[Decoding]) -> None:
        pass

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: Callable[[int], None] = ignore_progress,
    ) -> list[list[Candidate]]:
        self.asked += instructions
        on_candidates(len(instructions) * sum(decoding.num_samples for decoding in decodings))
        return [
            [
                Candidate(response=f"{text} {decoding.name} {seed} {n}", generator=self.name)
                for decoding in decodings
                for n in range(decoding.num_samples)
            ]
            for text in instructions
        ]

    def take_counts(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        pass

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        return [(-float(len(response)), 2) for _, response in pairs]


def instance(number: int, **values: object) -> Instance:
    return Instance(instance_id=str(number), instruction=f"say {number}", references=("x",), **values)  # type: ignore[arg-type]


def test_paper17_draws_seventeen() -> None:
    assert sum(decoding.num_samples for decoding in STRATEGIES["paper17"]) == 17


def test_candidates_are_appended_and_choices_learn_their_likelihood() -> None:
    given = instance(1, candidates=(Candidate(response="own"),))
    closed = instance(2, choices=("x", "yes"), candidates=(Candidate(response="yes", source="choice"),))
    first, second = sample([given, closed], [Echo()], [GREEDY], seed=0)
    assert [c.response.split()[0] for c in first.candidates] == ["own", "say"]
    assert [(c.response, c.source, c.logprob_sum, c.logprob_mean) for c in second.candidates] == [
        ("yes", "choice", -3.0, -1.5)
    ]


def test_draws_depend_on_the_seed_and_not_on_the_part() -> None:
    parts = [[instance(1), instance(2)], [instance(3)]]
    alone = [one for part in parts for one in sample(part, [Echo()], [GREEDY], seed=7)]
    assert list(sample([*parts[0], *parts[1]], [Echo()], [GREEDY], seed=7)) == alone
    assert list(sample(parts[1], [Echo()], [GREEDY], seed=8)) != alone[2:]


def test_generators_of_a_run_draw_with_seeds_of_their_own() -> None:
    (drawn,) = sample([instance(1)], [Echo("one"), Echo("two")], [GREEDY], seed=0)
    one, two = (candidate.response for candidate in drawn.candidates)
    assert one != two


class Silent(Echo):
    """Does not know how likely a response is."""

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> None:  # type: ignore[override]
        pass


def test_choices_learn_their_likelihood_from_the_first_generator_that_knows() -> None:
    choices = tuple(Candidate(response=text, source="choice") for text in ("x", "yes"))
    closed = instance(1, choices=("x", "yes"), candidates=choices)
    (actual,) = sample([closed], [Silent(), Echo()], [GREEDY], seed=0)
    assert [(one.logprob_sum, one.num_tokens) for one in actual.candidates] == [(-1.0, 2), (-3.0, 2)]
    assert list(sample([closed], [Silent()], [GREEDY], seed=0)) == [closed]


def test_what_a_part_took_counts_what_was_drawn_and_may_be_selected() -> None:
    drawn = [("a", "ok"), ("a", "truncated"), ("b", "ok"), ("", "empty"), ("", "refused"), ("", "refused")]
    candidates = [Candidate(response=text, generator="echo", status=status) for text, status in drawn]  # type: ignore[arg-type]
    brought = Candidate(response="a", generator="people")
    part = [instance(1, candidates=(brought, *candidates)), instance(2, candidates=(brought, candidates[0]))]
    assert count_part(part, [Echo()]) == {
        "sampled": 7, "empty": 1, "refused": 2, "failed": 0, "truncated": 1, "filtered": 0, "distinct": 3,
        "duplicates": 1,
    }  # fmt: skip
    assert count_part(part, []) == {}


def test_a_generator_is_only_asked_for_what_is_its_own(tmp_path: Path, llm_folder: Path) -> None:
    """No endpoint can do beams, and here none has to."""
    write(tmp_path / "in", [instance(1)])
    (tmp_path / "s.yaml").write_text(
        "[{name: b, do_sample: false, num_beams: 2, generator: 0}, {name: s, num_samples: 2, generator: 1}]"
    )
    with serving(Model()) as url:
        generators = (str(llm_folder), f"openai:m@{url}")
        paths: dict[str, Any] = {"source": tmp_path / "in", "target": tmp_path / "out", "work": tmp_path / "work"}
        run(SamplingConfig(**paths, generator=generators, strategy=str(tmp_path / "s.yaml")))
    (actual,) = read(tmp_path / "out")
    assert [(one.generator, one.decoding) for one in actual.candidates] == [
        (generators[0], "b"),
        *[(generators[1], "s")] * 2,
    ]


def test_nothing_to_sample_from_is_said_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="instance '1'.*--generator"):
        list(sample([instance(1)], [], [GREEDY], seed=0))


def test_the_step_samples_from_a_real_llm_and_its_second_run_does_nothing(tmp_path: Path, llm_folder: Path) -> None:
    write(tmp_path / "in", [instance(n) for n in range(5)])

    def config(target: str) -> SamplingConfig:
        return SamplingConfig(
            source=tmp_path / "in",
            target=tmp_path / target,
            generator=(str(llm_folder),),
            strategy="sampling8",
            part_rows=2,
            work=tmp_path / "work",
        )

    manifest = run(config("one"))
    metrics = manifest.metrics
    assert [metrics[name] for name in ("instances", "candidates", "sampled", "cut")] == [5, 40, 40, 0]
    assert metrics["distinct"] + metrics["duplicates"] + metrics["empty"] == 40
    assert "cost" not in metrics
    parts = sorted((tmp_path / "work").rglob("*.parquet"))
    before = [path.stat().st_mtime_ns for path in parts]
    assert run(config("two")).hash == manifest.hash
    assert [path.stat().st_mtime_ns for path in parts] == before
    assert list(read(tmp_path / "one")) == list(read(tmp_path / "two"))
    assert all(c.logprob_sum is not None and c.revision for i in read(tmp_path / "one") for c in i.candidates)


def test_a_decoding_for_one_generator_is_drawn_by_that_one() -> None:
    first, second = STRATEGIES["paper-pretrain"]
    (drawn,) = sample([instance(1)], [Echo(), Echo("other")], [first, second], seed=0)
    assert [(c.generator, c.response.split()[2]) for c in drawn.candidates] == [
        *[("echo", first.name)] * 5,
        *[("other", second.name)] * 5,
    ]


def test_a_strategy_for_two_generators_is_refused_with_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--strategy.* 2 generators.* 1.*--generator"):
        SamplingConfig(source=tmp_path, target=tmp_path, generator=("builtin",), strategy="paper-pretrain")


def test_candidates_do_not_depend_on_the_size_of_parts_and_cuts_are_counted(tmp_path: Path, llm_folder: Path) -> None:
    long = Instance(instance_id="long", instruction="where is the dog " * 300, references=("x",))
    write(tmp_path / "in", [*(instance(n) for n in range(4)), long])

    def drawn(part_rows: int) -> list[list[str]]:
        config = SamplingConfig(
            source=tmp_path / "in",
            target=tmp_path / f"out{part_rows}",
            generator=(str(llm_folder),),
            strategy="beam2+sampling3",
            part_rows=part_rows,
            work=tmp_path / "work",
        )
        assert run(config).metrics["cut"] == 1
        return [[candidate.response for candidate in one.candidates] for one in read(config.target)]

    assert drawn(2) == drawn(5)


def test_an_edited_file_of_decodings_is_other_work(tmp_path: Path, llm_folder: Path) -> None:
    write(tmp_path / "in", [instance(1)])
    strategy = tmp_path / "s.yaml"
    counts = []
    for count in (1, 3):
        strategy.write_text(f"[sampling{count}]")
        config = SamplingConfig(
            source=tmp_path / "in",
            target=tmp_path / f"out{count}",
            generator=(str(llm_folder),),
            strategy=str(strategy),
            work=tmp_path / "work",
        )
        manifest = run(config)
        counts.append(manifest.metrics["sampled"])
        assert manifest.config["decodings"][0]["num_samples"] == count
    assert counts == [1, 3]


def test_an_unknown_strategy_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'paper18'.*greedy"):
        SamplingConfig(source=tmp_path, target=tmp_path, strategy="paper18")


def test_the_length_of_responses_is_a_setting(tmp_path: Path, llm_folder: Path) -> None:
    write(tmp_path / "in", [instance(n) for n in range(4)])

    def config(**values: object) -> SamplingConfig:
        given = {"source": tmp_path / "in", "generator": (str(llm_folder),), "strategy": "beam2+sampling2"}
        return SamplingConfig(**{**given, "work": tmp_path / "work", **values})  # type: ignore[arg-type]

    run(config(target=tmp_path / "short", max_new_tokens=3))
    assert max(c.num_tokens or 0 for one in read(tmp_path / "short") for c in one.candidates) == 3
    run(config(target=tmp_path / "long"))
    assert max(c.num_tokens or 0 for one in read(tmp_path / "long") for c in one.candidates) > 3
    with pytest.raises(ConfigError, match="--max-new-tokens.*'beam4-leaky'.*min_new_tokens"):
        config(target=tmp_path / "none", strategy="paper17-leaky", max_new_tokens=2)


def test_generators_that_would_draw_nothing_or_the_same_again_are_refused(tmp_path: Path) -> None:
    def config(*generator: str) -> SamplingConfig:
        return SamplingConfig(source=tmp_path, target=tmp_path, generator=generator, strategy="paper-pretrain")

    with pytest.raises(ConfigError, match="--generator 'builtin'.*twice"):
        config("builtin", "builtin")
    with pytest.raises(ConfigError, match="--generator 'c'.* 2 generators"):
        config("a", "b", "c")
