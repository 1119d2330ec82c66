"""`cappy score` and `cappy select`, as processes of their own."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from wording import assert_names

from cappy.scoring import Scorer
from cappy.selection.linear import SELECTOR, Rule, Selector

Cappy = Callable[..., subprocess.CompletedProcess[str]]

PAIRS = [(f"Say {word}.", word * count) for count, word in enumerate(["ja", "néin", "猫", "oui"] * 75, start=1)]


def jsonl(values: list[dict[str, object]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def test_score_keeps_order_and_fields_across_chunks_and_gives_the_scorers_numbers(
    cappy: Cappy, scorer_folder: Path
) -> None:
    given: list[dict[str, object]] = [
        {"id": index, "instruction": instruction, "response": response, "note": "猫"}
        for index, (instruction, response) in enumerate(PAIRS)
    ]
    done = cappy("score", "--scorer", scorer_folder, input="\ufeff" + jsonl(given).replace("\n", "\n\n", 3))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    scores = [answer.pop("score") for answer in answers]
    assert answers == given
    assert scores == pytest.approx(Scorer.load(str(scorer_folder)).score(PAIRS), abs=1e-4)
    assert len(set(scores)) > 10
    assert done.stderr.count("\n") == 1, "A4: once, with its count"
    assert_names(done.stderr, "cappy score: ", "287 of 300", "48 tokens", "286 responses")


def test_a4_nothing_is_said_where_nothing_is_cut(here: Cappy, tmp_path: Path) -> None:
    for verb, field in (("score", "response"), ("select", "responses")):
        line: dict[str, object] = {"instruction": "Say yes.", field: "yes" if verb == "score" else ["yes", "no"]}
        (tmp_path / "line.jsonl").write_text(jsonl([line]))
        done = here(verb, "--scorer", "builtin:tiny", "--source", tmp_path / "line.jsonl")
        assert (done.returncode, done.stderr) == (0, "")


def test_a5_select_ranks_by_logits_where_the_sigmoid_is_1_for_several(here: Cappy, saturated: Path) -> None:
    flags = [word for text in saturated_responses(saturated) for word in ("--response", text)]
    best = saturated_responses(saturated)[-1]
    assert here("select", "--scorer", saturated, "--instruction", "Say.", *flags).stdout.splitlines()[-1] == best
    rows = saturated.parent / "rows.jsonl"
    rows.write_text(jsonl([{"instruction": "Say.", "responses": saturated_responses(saturated)}]))
    answer = json.loads(here("select", "--scorer", saturated, "--source", rows).stdout)
    assert (answer["selected"], answer["response"]) == (2, best)
    assert answer["scores"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"likelihoods": [-1.0]}, ("likelihoods", "1 for 2 responses")),
        ({"likelihoods": "-1"}, ("likelihoods", "list of numbers")),
        ({"greedy": 2}, ("greedy", "0 to 1", "2")),
        ({"greedy": True}, ("greedy", "index of a response")),
        ({"closed_choices": "yes"}, ("closed_choices", "true or false")),
    ],
)
def test_select_refuses_what_does_not_fit_the_responses(
    here: Cappy, tmp_path: Path, fields: dict[str, object], names: tuple[str, ...]
) -> None:
    (tmp_path / "line.jsonl").write_text(jsonl([{"instruction": "Say yes.", "responses": ["yes", "no"], **fields}]))
    done = here("select", "--source", tmp_path / "line.jsonl")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert_names(done.stderr, "line.jsonl:1: ", *names)


def test_select_takes_the_selector_of_a_report_and_refuses_that_of_another_scorer(
    here: Cappy, tmp_path: Path, scorer_folder: Path
) -> None:
    rules = (Rule(features=("score", "mbr", "greedy"), weights=(0.0, 0.0, 1.0)),)
    line = {"instruction": "Say yes.", "responses": ["yes", "no", "maybe"], "greedy": 2}
    (tmp_path / "line.jsonl").write_text(jsonl([line]))
    flags = ("select", "--scorer", scorer_folder, "--source", tmp_path / "line.jsonl", "--selector", tmp_path)
    missing = here(*flags)
    assert_names(missing.stderr, "has no selector.json", "report")
    for version, status in ((Scorer.load(str(scorer_folder)).version, 0), ("another", 1)):
        (tmp_path / SELECTOR).write_text(Selector(rules=rules, scorer=version).to_json())
        done = here(*flags)
        assert done.returncode == status
    assert_names(done.stderr, "belongs to the scorer another", "evaluate")
    (tmp_path / SELECTOR).write_text(Selector(rules=rules).to_json())
    assert json.loads(here(*flags).stdout)["response"] == "maybe"


@pytest.fixture
def saturated(make_scorer: Callable[..., Path], tmp_path: Path) -> Path:
    """A scorer whose logits lie far above 36, where a sigmoid in fp64 is 1 for all."""
    scorer = Scorer.load(str(make_scorer(seed=41)), device="cpu", precision="fp32")
    scorer.model.classifier.out_proj.bias.data += 60
    scorer.save(tmp_path / "saturated")
    return tmp_path / "saturated"


TEXTS = ["yes", "no no", "perhaps it is"]


def saturated_responses(folder: Path) -> list[str]:
    """Three responses, the worst first."""
    logits = Scorer.load(str(folder)).logits_of([("Say.", text) for text in TEXTS])
    return [TEXTS[index] for index in sorted(range(len(TEXTS)), key=logits.__getitem__)]


def test_select_adds_the_index_the_text_and_all_scores(here: Cappy, scorer_folder: Path, tmp_path: Path) -> None:
    groups: list[dict[str, object]] = [
        {"instruction": "Say yes.", "responses": ["yes", "no", "perhaps"]},
        {"instruction": "Say no.", "responses": ["no"]},
        {"instruction": "Say it twice.", "responses": ["it", "it", "it it"]},
    ]
    source = tmp_path / "groups.jsonl"
    source.write_text(jsonl(groups))
    done = here("select", "--scorer", scorer_folder, "--source", source)
    assert done.returncode == 0, done.stderr
    scorer = Scorer.load(str(scorer_folder))
    for line, group in zip(done.stdout.splitlines(), groups, strict=True):
        answer = json.loads(line)
        instruction, responses = str(group["instruction"]), list(map(str, group["responses"]))  # type: ignore[call-overload]
        expected = scorer.select(instruction, responses)
        assert answer["selected"] == expected.index
        assert answer["response"] == expected.response
        assert answer["scores"] == pytest.approx(expected.scores, abs=1e-4)
        assert answer["instruction"] == instruction


def test_one_pair_prints_the_number_and_one_group_prints_the_pick(here: Cappy, scorer_folder: Path) -> None:
    scorer = Scorer.load(str(scorer_folder))
    number = here("score", "--scorer", scorer_folder, "--instruction", "Say yes.", "--response", "yes")
    assert float(number.stdout) == pytest.approx(scorer.score([("Say yes.", "yes")])[0], abs=1e-6)
    texts = ["no", "yes", "perhaps"]
    flags = [word for text in texts for word in ("--response", text)]
    pick = here("select", "--scorer", scorer_folder, "--instruction", "Say yes.", *flags)
    assert pick.stdout == scorer.select("Say yes.", texts).response + "\n"


def test_a_bad_line_is_one_line_on_stderr_and_status_1(here: Cappy, scorer_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n')
    done = here("score", "--scorer", scorer_folder, "--source", "pairs.jsonl")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert_names(done.stderr, "cappy score: pairs.jsonl:2: ", "field 'response'", "fields found: 'instruction'")


def test_a_missing_file_and_a_missing_scorer_are_one_line_each(here: Cappy, tmp_path: Path) -> None:
    absent = here("score", "--source", tmp_path / "absent.jsonl")
    assert_names(absent.stderr, f"cappy score: {tmp_path}/absent.jsonl: ", "no such file", "--source")
    folder = here("score", "--scorer", "absent")
    assert_names(folder.stderr, "cappy score: absent: ", "builtin", "a folder", "hub:")
    for done in (absent, folder):
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")


@pytest.mark.parametrize("verb", ["score", "select"])
def test_half_of_a_one_off_is_wrong_usage(here: Cappy, verb: str) -> None:
    for flags in (["--instruction", "a"], ["--response", "a"]):
        done = here(verb, *flags)
        assert done.returncode == 2
        assert "must be given together" in done.stderr
