"""Nothing is drawn twice: candidates are kept by what was asked, whatever the run around it looks like."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pytest
from chat_server import Model, serving
from wording import raises_naming

from cappy.errors import FolderError
from cappy.model_folder import open_model_folder
from cappy.records import Candidate, Instance, read, write
from cappy.sampling import step
from cappy.sampling.architectures import Seq2Seq
from cappy.sampling.generators import LocalGenerator, OnCandidates, SampleRange
from cappy.sampling.local import LocalLLM
from cappy.sampling.step import SamplingConfig, run
from cappy.sampling.store import CandidateStore, Origin, StoreEntry, list_entries, remove_entry, sample_key
from cappy.sampling.strategies import GREEDY, Decoding, parse_strategy

ORIGIN = Origin(generator="fake", revision="1", version=1)


class Counting(LocalGenerator):
    """Draws texts that say what was asked, four prompts at a time, and counts."""

    def __init__(self, name: str = "fake", revision: str = "1", *, system: str = "", dies_after: int = 0) -> None:
        super().__init__(name, revision)
        self.system = system
        self.drawn: list[tuple[str, str, int]] = []
        self._dies_after = dies_after

    def _prompts(self, instructions: Sequence[str], reserved: int) -> list[list[int]]:
        return [list(f"{self.system} {instruction}".encode()) for instruction in instructions]

    @staticmethod
    def _is_extendable(decoding: Decoding) -> bool:
        return decoding.do_sample

    def _draw(
        self,
        instructions: Sequence[str],
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[SampleRange],
        *,
        seed: int,
        on_candidates: OnCandidates,
    ) -> Iterator[dict[int, list[list[Candidate]]]]:
        for start in range(0, len(prompts), 4):
            if self._dies_after and len(self.drawn) >= self._dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            batch: dict[int, list[list[Candidate]]] = {}
            for place in range(start, min(start + 4, len(prompts))):
                batch[place] = [self._samples(instructions[place], one, seed) for one in wanted]
            on_candidates(sum(len(drawn) for own in batch.values() for drawn in own))
            yield batch

    def _samples(self, instruction: str, wanted: SampleRange, seed: int) -> list[Candidate]:
        name = wanted.decoding.name
        numbers = range(wanted.first, wanted.first + wanted.decoding.num_samples)
        self.drawn += [(instruction, name, number) for number in numbers]
        return [
            Candidate(
                response=f"{self.system} {instruction} {name} {wanted.decoding.temperature} {number}",
                generator=self.name,
                revision=self.revision,
                decoding=name,
                seed=seed,
                logprob_sum=-number / 3,
                logprob_mean=-number / 7,
                num_tokens=number,
            )
            for number in numbers
        ]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Not known."""


Sample = Callable[..., Counting]


def instances(folder: Path, count: int) -> None:
    write(folder, [Instance(instance_id=str(n), instruction=f"say {n}", references=("x",)) for n in range(count)])


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """Runs the step over twelve instances with a generator that counts, which it returns."""
    instances(tmp_path / "in", 12)
    runs = iter(range(100))

    def run_step(generator: Counting | None = None, spec: str = "fake", **values: object) -> Counting:
        generator = generator or Counting()

        def load(spec: str, terms: object, *, work: Path) -> Counting:
            generator.use_store(work)
            return generator

        monkeypatch.setattr(step, "load_generator", load)
        given = {"source": tmp_path / "in", "work": tmp_path / "work", "target": tmp_path / f"out{next(runs)}"}
        config = SamplingConfig(**{**given, "generator": (spec,), "strategy": "greedy+sampling4", **values})  # type: ignore[arg-type]
        run(config)
        generator.target = config.target  # type: ignore[attr-defined]
        return generator

    return run_step


def candidates(generator: Counting) -> list[list[Candidate]]:
    return [list(instance.candidates) for instance in read(generator.target)]  # type: ignore[attr-defined]


def test_another_part_size_draws_nothing_again(sample: Sample) -> None:
    first = sample(part_rows=12)
    assert len(first.drawn) == 12 * 5
    second = sample(part_rows=5)
    assert second.drawn == []
    assert candidates(second) == candidates(first)


def test_a_fresh_run_draws_again_and_its_own_further_attempt_does_not(sample: Sample) -> None:
    assert len(sample().drawn) == 12 * 5
    assert len(sample(fresh="again").drawn) == 12 * 5
    assert sample(fresh="again", part_rows=5).drawn == []
    assert len(sample(fresh="once-more").drawn) == 12 * 5


def test_one_decoding_more_draws_that_one_alone(sample: Sample) -> None:
    first = sample()
    second = sample(strategy="greedy+sampling4+topk40x2")
    assert {name for _, name, _ in second.drawn} == {"topk40"}
    assert len(second.drawn) == 12 * 2
    assert [own[:5] for own in candidates(second)] == candidates(first)


def test_more_samples_draw_the_others_alone(sample: Sample) -> None:
    first = sample()
    second = sample(strategy="greedy+sampling7")
    assert {(name, number) for _, name, number in second.drawn} == {("sampling", number) for number in (4, 5, 6)}
    assert [own[:5] for own in candidates(second)] == candidates(first)
    third = sample(strategy="greedy+sampling6")
    assert third.drawn == []
    assert [own[:7] for own in candidates(second)] == candidates(third)


def test_other_shards_draw_nothing_again(sample: Sample) -> None:
    halves = [sample(shard=f"{n}/2") for n in range(2)]
    assert [len(one.drawn) for one in halves] == [30, 30]
    quarters = [sample(shard=f"{n}/4") for n in range(4)]
    assert [one.drawn for one in quarters] == [[], [], [], []]
    assert [own for one in quarters for own in candidates(one)] == [own for one in halves for own in candidates(one)]


def test_more_instances_draw_for_those_alone(sample: Sample, tmp_path: Path) -> None:
    sample()
    instances(tmp_path / "more", 15)
    assert {text for text, _, _ in sample(source=tmp_path / "more").drawn} == {"say 12", "say 13", "say 14"}


@pytest.mark.parametrize(
    "other",
    [
        lambda: {"generator": Counting(system="Be brief.")},
        lambda: {"generator": Counting(revision="2")},
        lambda: {"generator": Counting("other")},
        lambda: {"strategy": "greedy+temperature0.9x4"},
        lambda: {"max_new_tokens": 9},
        lambda: {"seed": 1},
    ],
)
def test_what_changes_a_draw_draws_anew(other: Callable[[], dict[str, object]], sample: Sample) -> None:
    sample()
    values = other()
    generator = values.pop("generator", Counting())
    assert isinstance(generator, Counting)
    # Another part size, so that the step asks for every candidate.
    drawn = sample(generator, spec=generator.name, part_rows=3, **values).drawn
    assert len(drawn) == 12 * (4 if "temperature0.9" in str(values) else 5)


def test_a_new_version_of_the_drawing_code_draws_anew(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    sample()
    monkeypatch.setattr("cappy.sampling.generators.DRAWING_VERSION", 2)
    assert len(sample(part_rows=3).drawn) == 60


def test_every_knob_is_part_of_the_key_and_the_generators_position_is_not(tmp_path: Path) -> None:
    plain = Decoding(name="d", top_p=0.9)
    knobs: list[dict[str, Any]] = [
        {"name": "e"}, {"temperature": 0.7}, {"top_p": 0.8}, {"max_new_tokens": 9}, {"top_k": 4}, {"min_p": 0.1},
        {"min_new_tokens": 2}, {"do_sample": False, "top_p": 1.0},
    ]  # fmt: skip
    generator = Counting()
    generator.use_store(tmp_path)
    generator.sample(["one"], [plain], seed=0)
    for changed in ({}, {"generator": 1}, *knobs):
        before = len(generator.drawn)
        generator.sample(["one"], [replace(plain, **changed)], seed=0)
        assert len(generator.drawn) - before == (changed in knobs)
    generator.close()


def test_equal_instructions_are_drawn_for_once_and_all_are_counted(tmp_path: Path) -> None:
    generator, counts = Counting(), []

    def count(drawn: int, /, *, in_progress: float = 0.0) -> None:
        counts.append(drawn)

    one, two, other = generator.sample(["a", "a", "b"], [replace(GREEDY, name="g")], seed=0, on_candidates=count)
    assert one == two != other
    assert len(generator.drawn) == 2
    assert sum(counts) == 3


KILLED = """
import sys
from pathlib import Path
from test_store import Counting
generator = Counting(dies_after=int(sys.argv[2]))
generator.use_store(Path(sys.argv[1]))
from cappy.sampling.strategies import GREEDY
generator.sample([f"say {n}" for n in range(int(sys.argv[3]), int(sys.argv[4]))], [GREEDY], seed=0)
"""


def start(work: Path, dies_after: int, first: int, last: int) -> "subprocess.Popen[bytes]":
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "fakes")]
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    arguments = [str(work), str(dies_after), str(first), str(last)]
    return subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env={**os.environ, "PYTHONPATH": path})


def test_after_kill_9_within_a_part_only_what_was_under_way_is_drawn_again(tmp_path: Path) -> None:
    assert start(tmp_path, 20, 0, 60).wait(120) == -signal.SIGKILL
    generator = Counting()
    generator.use_store(tmp_path)
    texts = [f"say {n}" for n in range(60)]
    after = generator.sample(texts, [GREEDY], seed=0)
    assert [text for text, _, _ in generator.drawn] == texts[20:]
    assert after == Counting().sample(texts, [GREEDY], seed=0)
    generator.close()


def test_processes_that_draw_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0, first, first + 60) for first in (0, 40, 80)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    generator = Counting()
    generator.use_store(tmp_path)
    generator.sample([f"say {n}" for n in range(140)], [GREEDY], seed=0)
    assert generator.drawn == []
    generator.close()


def test_what_another_process_keeps_is_seen_while_this_one_runs(tmp_path: Path) -> None:
    mine, other = Counting(), Counting()
    for one in (mine, other):
        one.use_store(tmp_path)
    mine.sample(["a", "b"], [GREEDY], seed=0)
    assert other.sample(["b", "c"], [GREEDY], seed=0) == Counting().sample(["b", "c"], [GREEDY], seed=0)
    assert [text for text, _, _ in other.drawn] == ["c"]
    mine.sample(["c"], [GREEDY], seed=0)
    assert [text for text, _, _ in mine.drawn] == ["a", "b"]
    mine.close()
    other.close()


def key(number: int) -> str:
    return sample_key(number=number)


def drawn(number: int, count: int = 2) -> list[Candidate]:
    own = {"generator": "fake", "revision": "1", "decoding": "d", "seed": 7}
    return [Candidate(response=f"{number} é \ud800 {n}", logprob_sum=-1 / 3, num_tokens=n, **own) for n in range(count)]  # type: ignore[arg-type]


def test_a_file_cut_at_any_byte_or_damaged_gives_whole_sets_or_none(tmp_path: Path) -> None:
    keys = [key(number) for number in range(3)]
    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({keys[0]: drawn(0), keys[1]: drawn(1)})
        store.put({keys[2]: drawn(2)})
    (file,) = tmp_path.rglob("*.jsonl")
    whole = file.read_bytes()
    expected = {own: tuple(drawn(number)) for number, own in enumerate(keys)}
    sizes = []
    for length in range(0, len(whole) + 1, 3):
        file.write_bytes(whole[:length])
        with CandidateStore(tmp_path, ORIGIN) as store:
            result = store.get(keys)
        assert result.items() <= expected.items()
        sizes.append(len(result))
    assert sizes == sorted(sizes)
    for place in range(0, len(whole), 11):
        file.write_bytes(whole[:place] + b"\0" + whole[place + 1 :])
        with CandidateStore(tmp_path, ORIGIN) as store:
            result = store.get(keys)
        # A changed letter in a text cannot be known; a key, a place or a shape that is wrong can.
        assert all(len(one) == 2 and one[0].seed == 7 for one in result.values())


def test_a_block_is_seen_once_it_is_whole(tmp_path: Path) -> None:
    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({key(1): drawn(1)})
        (file,) = tmp_path.rglob("*.jsonl")
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])
        with CandidateStore(tmp_path, ORIGIN) as other:
            assert other.get([key(1)]) == {}
            file.write_bytes(whole)
            assert other.get([key(1)]) == {key(1): tuple(drawn(1))}


def test_the_longest_set_of_a_key_counts_and_what_failed_is_not_kept(tmp_path: Path) -> None:
    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({key(1): drawn(1, 3)})
        store.put({key(1): drawn(1, 2), key(2): [replace(drawn(2)[0], status="failed")]})
        assert store.get([key(1), key(2), key(3)]) == {key(1): tuple(drawn(1, 3))}


def test_many_sets_in_many_files_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cappy.sampling.store._MAX_FILE_BYTES", 5000)
    with CandidateStore(tmp_path, ORIGIN) as store:
        for first in range(0, 300, 20):
            store.put({key(number): drawn(number) for number in range(first, first + 20)})
            result = store.get([key(number) for number in range(300)])
            assert len(result) == first + 20
        assert all(result[key(number)] == tuple(drawn(number)) for number in range(300))
    assert len(list(tmp_path.rglob("*.jsonl"))) > 3


def test_after_a_write_that_was_broken_off_what_is_kept_next_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: IO[bytes], block: bytes) -> None:
        file.write(block[: len(block) // 2])
        raise KeyboardInterrupt

    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({key(1): drawn(1)})
        with monkeypatch.context() as patch:
            patch.setattr("cappy.sampling.store._write_all", broken)
            with pytest.raises(KeyboardInterrupt):
                store.put({key(2): drawn(2)})
        store.put({key(3): drawn(3)})
        assert store.get([key(1), key(2), key(3)]) == {key(1): tuple(drawn(1)), key(3): tuple(drawn(3))}


def test_keys_that_share_a_place_in_the_index_are_reported_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy.sampling.store._key_number", lambda key: 7)
    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({key(number): drawn(number) for number in range(5)})
        store.put({key(6): drawn(6)})
        assert store.get([key(number) for number in range(8)]) == {key(n): tuple(drawn(n)) for n in (*range(5), 6)}


def test_what_is_kept_is_for_its_owner_alone(tmp_path: Path) -> None:
    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({key(1): drawn(1)})
    kept = tmp_path / "candidates"
    modes = {path.stat().st_mode & 0o777 for path in kept.rglob("*")} | {kept.stat().st_mode & 0o777}
    assert modes == {0o700, 0o600}


def test_entries_are_listed_with_size_and_last_use_and_are_removed_unless_in_use(tmp_path: Path) -> None:
    assert list_entries(tmp_path) == []
    before = time.time() - 1
    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({key(1): drawn(1), key(2): drawn(2)})
        (one,) = list_entries(tmp_path)
        assert (one.kind, one.generator, one.revision, one.version, one.sets) == ("candidates", "fake", "1", 1, 2)
        assert one.size_bytes == sum(path.stat().st_size for path in one.path.glob("*.jsonl"))
        assert one.last_used >= before
        with raises_naming(FolderError, str(one.path)):
            remove_entry(one)
        assert store.get([key(1)])
    remove_entry(one)
    assert list_entries(tmp_path) == []
    with CandidateStore(tmp_path, ORIGIN) as store:
        assert store.get([key(1)]) == {}
        store.put({key(1): drawn(1)})
        assert store.get([key(1)])


def test_a_use_is_noted_though_nothing_is_drawn(tmp_path: Path) -> None:
    with CandidateStore(tmp_path, ORIGIN) as store:
        store.put({key(1): drawn(1)})
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert [one.last_used for one in list_entries(tmp_path)] == [1e9]
    CandidateStore(tmp_path, ORIGIN).close()
    assert [one.last_used > 1e9 for one in list_entries(tmp_path)] == [True]


def test_a_real_llm_draws_nothing_twice_and_its_likelihoods_come_back_to_the_last_bit(
    tmp_path: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    inner = LocalLLM._respond_batch

    def counted(self: LocalLLM, instructions: Sequence[str], *rest: object) -> object:
        calls.append(len(instructions))
        return inner(self, instructions, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalLLM, "_respond_batch", counted)
    instances(tmp_path / "in", 7)

    def drawn_by(**values: object) -> list[Instance]:
        target = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        given = {"source": tmp_path / "in", "target": target, "work": tmp_path / "work"}
        run(SamplingConfig(**{**given, "generator": (str(llm_folder),), "strategy": "beam2+sampling3", **values}))  # type: ignore[arg-type]
        return list(read(target))

    first = drawn_by(part_rows=7)
    assert sum(calls) == 7
    assert drawn_by(part_rows=2) == first
    assert sum(calls) == 7
    assert [one.candidates[:4] for one in drawn_by(strategy="beam2+sampling3+greedy")] == [
        one.candidates for one in first
    ]
    assert sum(calls) == 14
    drawn_by(strategy="beam3+sampling3")
    assert sum(calls) == 21, "the beams of another width are others"


def test_samples_that_are_drawn_later_are_those_that_would_have_been_drawn_at_once(
    tmp_path: Path, llm_folder: Path
) -> None:
    texts = ["where is the dog", "who"]
    generator = Seq2Seq("tiny", open_model_folder(llm_folder))
    at_once = generator.sample(texts, parse_strategy("greedy+sampling5"), seed=0)
    generator.use_store(tmp_path)
    generator.sample(texts, parse_strategy("sampling2"), seed=0)
    later = generator.sample(texts, parse_strategy("greedy+sampling5"), seed=0)
    generator.close()
    assert [[one.response for one in own] for own in later] == [[one.response for one in own] for own in at_once]
    for one, other in zip(chain(*later), chain(*at_once), strict=True):
        assert one.logprob_sum == pytest.approx(other.logprob_sum, abs=1e-4)


def test_an_endpoint_is_asked_for_what_is_new_alone(tmp_path: Path) -> None:
    instances(tmp_path / "in", 12)
    model = Model()

    def paid(address: str, **values: object) -> int:
        before = sum(model.answered.values())
        given = {"source": tmp_path / "in", "target": tmp_path / f"out{len(list(tmp_path.iterdir()))}"}
        config = {"work": tmp_path / "work", "generator": (f"openai:m@{address}",), "strategy": "greedy+sampling4"}
        run(SamplingConfig(**{**given, **config, **values}))  # type: ignore[arg-type]
        return sum(model.answered.values()) - before

    with serving(model) as url:
        assert [paid(url, shard=f"{n}/2") for n in range(2)] == [30, 30]
        assert [paid(url, shard=f"{n}/4", part_rows=2) for n in range(4)] == [0, 0, 0, 0]
        assert paid(url, strategy="greedy+sampling4+topp0.9x2") == 24
        assert paid(url, strategy="greedy+temperature0.7x4") == 48
        assert paid(f"{url}/other") == 60
    (answers,) = list_entries(tmp_path / "work")
    assert (answers.kind, answers.sets) == ("answers", 60 + 24 + 48 + 60)
    spent = sorted((tmp_path / "work/answers/spent").rglob("*.txt"))
    remove_entry(answers)
    assert list_entries(tmp_path / "work") == []
    assert sorted((tmp_path / "work/answers/spent").rglob("*.txt")) == spent


def test_an_entry_says_what_it_is_in_its_folder(tmp_path: Path) -> None:
    CandidateStore(tmp_path, ORIGIN).close()
    (entry,) = list_entries(tmp_path)
    assert isinstance(entry, StoreEntry)
    assert json.loads((entry.path / "origin.json").read_text()) == {"generator": "fake", "revision": "1", "version": 1}
