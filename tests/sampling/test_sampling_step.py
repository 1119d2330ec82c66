"""The step: candidates appended once, resumed at parts, nothing sampled twice."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from cappy.errors import ConfigError
from cappy.records import Candidate, Instance, read, write
from cappy.sampling import SamplingConfig, run
from cappy.sampling.candidates import sample
from cappy.sampling.generators import unheard
from cappy.sampling.strategies import GREEDY, STRATEGIES, Decoding


class Echo:
    """Answers with the instruction and the seed, and counts."""

    name = "echo"
    revision = "1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check(self, decodings: Sequence[Decoding]) -> None:
        pass

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        told: Callable[[int], None] = unheard,
    ) -> list[list[Candidate]]:
        self.asked += instructions
        told(len(instructions) * sum(decoding.num_samples for decoding in decodings))
        return [
            [
                Candidate(response=f"{text} {decoding.name} {seed} {n}", generator=self.name)
                for decoding in decodings
                for n in range(decoding.num_samples)
            ]
            for text in instructions
        ]

    def tally(self) -> Mapping[str, int]:
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


def test_nothing_to_sample_from_is_said_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="instance '1' has no candidate; name an LLM with --generator"):
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
    echo, other = Echo(), Echo()
    other.name = "other"
    (drawn,) = sample([instance(1)], [echo, other], [first, second], seed=0)
    assert [(c.generator, c.response.split()[2]) for c in drawn.candidates] == [
        *[("echo", first.name)] * 5,
        *[("other", second.name)] * 5,
    ]


def test_a_strategy_for_two_generators_is_refused_with_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--strategy is for 2 generators, got 1"):
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
    with pytest.raises(ConfigError, match="'paper18' is unknown; choose one of greedy"):
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
    with pytest.raises(ConfigError, match="--max-new-tokens: decoding 'beam4-leaky': min_new_tokens must be"):
        config(target=tmp_path / "none", strategy="paper17-leaky", max_new_tokens=2)
