"""What a run would take is said before anything is asked, and what it took while it goes."""

from dataclasses import replace
from pathlib import Path

import pytest
from chat_server import Model, serving

from cappy.errors import ConfigError
from cappy.progress import FileProgress, read_state
from cappy.records import Instance, write
from cappy.sampling.estimate import SECONDS_PER_REQUEST, TOKENS_PER_SECOND, describe, estimate
from cappy.sampling.generators import estimate_tokens
from cappy.sampling.step import SamplingConfig, endpoint_config, run

PROMPTS = [f"prompt {i}" for i in range(60)]


def config_at(folder: Path, url: str, **values: object) -> SamplingConfig:
    given = {"source": folder / "in", "target": folder / "out", "work": folder / "work", "strategy": "endpoint8"}
    return SamplingConfig(**{**given, "generator": (f"openai:m@{url}",), **values})  # type: ignore[arg-type]


def instances(folder: Path, *, closed: int = 0) -> None:
    rows = [Instance(instance_id=str(i), instruction=text, references=("x",)) for i, text in enumerate(PROMPTS)]
    choices = ("x", "y")
    write(folder, [*rows[closed:], *(replace(row, choices=choices) for row in rows[:closed])])


def test_an_estimate_is_what_a_run_takes_at_most(tmp_path: Path) -> None:
    instances(tmp_path / "in")
    model = Model()
    with serving(model) as url:
        config = config_at(tmp_path, url, price_input=1.0, price_output=2.0, concurrency=4, max_new_tokens=64)
        (result,) = estimate(config)
        assert model.asked == []
        run(config)
    assert (result.instances, result.candidates, result.requests, result.answered) == (60, 480, 480, 0)
    assert result.input_tokens == 8 * sum(estimate_tokens(prompt) for prompt in PROMPTS) == 8 * (10 * 2 + 50 * 3)
    assert result.fewest_input_tokens == 3 * (10 * 2 + 50 * 3)
    assert result.output_tokens == 480 * 64
    assert result.cost == pytest.approx((result.input_tokens + 2 * result.output_tokens) / 1e6)
    assert result.minutes == pytest.approx(480 * (SECONDS_PER_REQUEST + 64 / TOKENS_PER_SECOND) / 4 / 60)
    assert len(model.asked) == result.fewest_requests == 180
    (after,) = estimate(config)
    assert (after.requests, after.answered, after.cost) == (0, 480, 0)


def test_limits_choices_shards_and_answers_shape_the_estimate(tmp_path: Path) -> None:
    instances(tmp_path / "in", closed=20)
    with serving(Model()) as url:
        config = config_at(tmp_path, url, requests_per_minute=10)
        (result,) = estimate(config)
        assert (result.instances, result.requests, result.minutes) == (40, 320, 32.0)
        assert "--requests-per-minute 10" in describe([result], endpoint_config(config))
        tokens = config_at(tmp_path, url, tokens_per_minute=100)
        (by_tokens,) = estimate(tokens)
        assert by_tokens.minutes == pytest.approx((by_tokens.input_tokens + by_tokens.output_tokens) / 100)
        assert "--tokens-per-minute 100" in describe([by_tokens], endpoint_config(tokens))
        run(config_at(tmp_path, url, strategy="sampling8", shard="0/4", target=tmp_path / "first"))
        (after,) = estimate(config_at(tmp_path, url, strategy="sampling8"))
        assert (after.requests, after.answered) == (25 * 8, 15 * 8)
        assert estimate(config_at(tmp_path, url, strategy="sampling8", shard="0/4"))[0].requests == 0


def test_each_generator_has_its_own_decodings(tmp_path: Path) -> None:
    instances(tmp_path / "in")
    config = config_at(
        tmp_path, "http://h/v1", generator=("builtin", "openai:m@http://h/v1"), strategy="paper-pretrain"
    )
    here, there = estimate(config)
    assert (here.generator, here.is_endpoint, here.candidates, here.requests) == ("builtin", False, 300, 0)
    assert (there.is_endpoint, there.candidates, there.requests, there.fewest_requests) == (True, 300, 300, 60)


def test_progress_tells_of_instances_candidates_tokens_errors_and_cost(tmp_path: Path) -> None:
    instances(tmp_path / "in")
    notes: list[tuple[int, str]] = []

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        assert (total, unit) == (60, "instances")
        notes.append((done, note))

    with serving(Model(latency=0.01)) as url:
        run(config_at(tmp_path, url, price_input=1.0, price_output=1.0, concurrency=2), progress)
    dones = [done for done, _ in notes]
    # One part alone, and yet it is told of on the way.
    assert len(set(dones)) > 10
    assert dones == sorted(dones)
    assert dones[-1] == 60
    assert notes[-1][1].startswith("480 candidates (")
    tokens = f"{180 * 10:,} tokens in, {480 * 5:,} out, 0 errors, cost {(180 * 10 + 480 * 5) / 1e6:.4g}"
    assert notes[-1][1].endswith(tokens)


def test_progress_in_a_file_keeps_the_note(tmp_path: Path) -> None:
    progress = FileProgress(tmp_path / "state.json")
    progress(3, 3, unit="instances", note="24 candidates")
    state = read_state(tmp_path / "state.json")
    assert state is not None
    assert state.note == "24 candidates"


def test_knobs_beyond_openais_are_refused_or_sent(tmp_path: Path) -> None:
    write(tmp_path / "in", [Instance(instance_id="1", instruction="say", references=("x",))])
    (tmp_path / "s.yaml").write_text("[{name: warm, min_p: 0.1, top_k: 7, min_new_tokens: 3}, sampling1]")
    model = Model()
    with serving(model) as url:
        given = config_at(tmp_path, url, strategy=str(tmp_path / "s.yaml"))
        with pytest.raises(ConfigError, match="warm.*--extra top_k"):
            run(given)
        extra = ("top_k", "min_p")
        with pytest.raises(ConfigError, match="warm.*--extra min_tokens"):
            run(config_at(tmp_path, url, strategy=str(tmp_path / "s.yaml"), extra=extra))
        assert model.asked == []
        run(config_at(tmp_path, url, strategy=str(tmp_path / "s.yaml"), extra=(*extra, "min_tokens")))
    knobs = sorted((body["top_k"], body["min_p"], body["min_tokens"]) for body in model.asked)
    assert knobs == [(-1, 0.0, 0), (7, 0.1, 3)]
