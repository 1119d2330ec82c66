"""The gate: a table of its decisions, and what it does to the aliases."""

import contextlib
import json
import multiprocessing
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import race
from differences import difference
from wording import assert_names, raises_naming

from cappy import registry
from cappy.cli import main
from cappy.errors import ConfigError, FolderError, RecordError, RegistryError
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_manifest
from cappy.registry import aliases
from cappy.registry.client import connect
from cappy.registry.gate import decide, parse_guards


def report(leaks: Mapping[str, int] | None = None, **lows: float) -> dict[str, Any]:
    comparisons = {f"selector-{name}": difference(low) for name, low in lows.items()}
    return {"comparisons": comparisons, "leaks": leaks or {"challenger": 0}, "split": "test", "facts": {"groups": 100}}


@pytest.mark.parametrize(
    ("result", "has_champion", "margin", "expected"),
    [
        (report(random=0.1, likelihood=0.1), False, 0.0, "promote"),
        (report(random=0.1), False, 0.0, "promote"),
        (report(random=0.1, likelihood=-0.01), False, 0.0, "hold"),
        (report(random=-0.01, likelihood=0.1), False, 0.0, "hold"),
        (report(random=0.0), False, 0.0, "hold"),
        (report(random=0.1, mbr=-0.2), False, 0.0, "promote"),
        (report(random=0.1), False, 0.1, "hold"),
        (report(likelihood=0.1), False, 0.0, "hold"),
        (report(random=0.1, likelihood=0.1, champion=0.01), True, 0.0, "promote"),
        (report(random=0.1, likelihood=0.1, champion=0.01), True, 0.02, "hold"),
        (report(random=0.1, likelihood=0.1, champion=-0.01), True, 0.0, "hold"),
        (report(random=-0.1, champion=0.01), True, 0.0, "promote"),
        (report(random=0.1, likelihood=0.1), True, 0.0, "hold"),
        (report({"challenger": 1}, random=0.1), False, 0.0, "hold"),
        (report({"challenger": 0, "champion": 2}, champion=0.1), True, 0.0, "hold"),
        ({**report(random=0.1, likelihood=0.1), "folds": 5, "split": "cross-fitted"}, False, 0.0, "promote"),
        ({**report(random=0.1), "split": "validation"}, False, 0.0, "hold"),
        (report(random=0.1, greedy=0.01), False, 0.0, "promote"),
        (report(random=0.1, greedy=-0.01), False, 0.0, "hold"),
        (report(random=0.1, best_system=-0.01), False, 0.0, "hold"),
        (report(random=0.1, greedy=0.01, best_system=-0.01), False, 0.0, "promote"),
        (report(champion=0.1, greedy=-0.01), True, 0.0, "promote"),
        (report(champion=0.1, greedy=-0.3), True, 0.0, "hold"),
        (report(champion=0.1, greedy=0.1, best_system=-0.3), True, 0.0, "promote"),
        ({**report(random=0.1), "facts": {"groups": 29}}, False, 0.0, "hold"),
        ({**report(random=0.1), "facts": {"groups": 30}}, False, 0.0, "promote"),
        ({**report(random=0.1), "facts": {}}, False, 0.0, "hold"),
    ],
)
def test_the_gate_opens_only_for_what_is_proven(
    result: dict[str, Any], has_champion: bool, margin: float, expected: str
) -> None:
    decision = decide(result, has_champion=has_champion, margin=margin)
    assert decision.decision == expected
    assert decision.reasons
    assert all(reason.endswith(".") for reason in decision.reasons)


def test_reasons_name_the_comparison_the_interval_and_the_leak() -> None:
    reasons = decide(report({"challenger": 3}, random=-0.02, mbr=0.01), has_champion=False).reasons
    assert_names(reasons[0], "challenger", "trained on 3")
    assert_names(reasons[1], "not proven", "random choice", "+3.0", "-2.0 to +8.0")
    assert_names(reasons[2], "for information", "MBR")


def test_a_gain_that_is_not_proven_says_how_many_groups_would_show_it() -> None:
    """At 80 % power the groups grow with the square of (2.83 standard errors / gain)."""
    reasons = decide(report(random=-0.02), has_champion=False).reasons
    assert_names(reasons[0], "3.0", "565 groups", "has 100")
    assert "groups" not in decide(report(random=-0.2), has_champion=False).reasons[0]
    later = decide(report(random=-0.02), has_champion=False, attempt=2).reasons[0]
    assert "1,093 groups" in later


@pytest.mark.parametrize(("attempt", "expected"), [(1, "promote"), (2, "hold"), (20, "hold")])
def test_a_later_attempt_on_the_same_groups_must_be_surer(attempt: int, expected: str) -> None:
    """2.2 standard errors are enough the first time, 3.1 every time, and nothing is from the 21st on."""
    weak, strong = report(random=0.005), report(random=0.02, champion=0.02)
    assert decide(weak, has_champion=False, attempt=attempt).decision == expected
    for result in strong["comparisons"].values():
        result["standard_error"] = result["difference"] / 3.2
    assert decide(strong, has_champion=True, attempt=attempt).decision == "promote"
    assert decide(strong, has_champion=True, attempt=21).decision == "hold"
    assert "new test split" in " ".join(decide(strong, has_champion=True, attempt=21).reasons)


@pytest.mark.parametrize("error", [0.0, None])
def test_differences_that_do_not_vary_prove_nothing(error: float | None) -> None:
    result = report()
    result["comparisons"]["selector-random"] = difference(0.1, 0.1, standard_error=error)
    decision = decide(result, has_champion=False)
    assert (decision.decision, "no standard error" in decision.reasons[0]) == ("hold", True)


@pytest.mark.parametrize(
    "comparisons",
    [None, [], {"selector-random": None}, {"selector-random": {"low": 0.1}}, {"selector-random": {"low": "x"}}],
)
def test_comparisons_of_another_form_are_one_line(comparisons: Any) -> None:
    with raises_naming(RecordError, "report: comparisons", "evaluate again"):
        decide({**report(), "comparisons": comparisons}, has_champion=False)


def test_the_reason_that_a_cross_fitted_report_has_no_champion_is_the_gates_reason() -> None:
    result = {**report(random=0.1), "folds": 5, "unavailable": {"champion": "its picks are of 52 other instances"}}
    decision = decide(result, has_champion=True)
    assert decision.decision == "hold"
    (reason,) = decision.reasons
    assert_names(reason, "champion", "its picks are of 52 other instances")


def test_a_promoted_version_is_champion_and_challenger_no_more(env: Any, registered: Any) -> None:
    _, result = registered("a")
    actual = env.promote(result)
    assert (actual["decision"], actual["serve"]) == ("promote", "cappy serve --scorer models:/cappy@champion")
    assert json.loads((env.folder / "decision-0" / "decision.json").read_text())["version"] == 1
    assert registry.resolve("models:/cappy@champion", tracking_uri=env.uri).aliases == ("champion",)


def test_a_held_version_stays_challenger_and_can_be_served(env: Any, registered: Any) -> None:
    _, result = registered("a", leaks={"challenger": 1})
    actual = env.promote(result)
    assert (actual["decision"], actual["serve"]) == ("hold", "cappy serve --scorer models:/cappy@challenger")
    assert registry.champion("cappy", tracking_uri=env.uri) is None


def test_promotion_reported_twice_stays_promoted(env: Any, registered: Any) -> None:
    _, result = registered("a")
    env.promote(result)
    again = env.promote(result)
    assert again["decision"] == "promote"
    (reason,) = again["reasons"]
    assert_names(reason, "Version 1", "already champion")


def test_a_report_on_another_scorer_opens_no_gate(env: Any, registered: Any) -> None:
    other = env.scorer("other", 9.0)
    registered("a", 1.0)
    actual = env.promote(env.report("report-other", other))
    assert actual["decision"] == "hold"
    assert_names(actual["reasons"][0], read_manifest(other).hash[:12], "not on version 1")
    assert registry.champion("cappy", tracking_uri=env.uri) is None


def test_a_report_that_was_edited_is_refused(env: Any, registered: Any) -> None:
    _, result = registered("a", 1.0, leaks={"challenger": 3})
    values = json.loads((result / "report.json").read_text())
    (result / "report.json").write_text(json.dumps({**values, "leaks": {}}))
    with raises_naming(FolderError, "report.json", "damaged"):
        env.promote(result)


def test_a_user_without_a_name_moves_the_alias_by_number(
    env: Any, registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    _, result = registered("a", 1.0)
    env.promote(result)
    assert registry.history("cappy", tracking_uri=env.uri)[0].by.startswith("uid ")


def test_a_champion_that_moved_since_the_report_holds_the_version(env: Any, registered: Any) -> None:
    one, first = registered("a", 1.0)
    env.promote(first)
    _, second = registered("b", 2.0, champion=one)
    env.promote(second)
    _, late = registered("c", 3.0, champion=one)
    actual = env.promote(late)
    assert actual["decision"] == "hold"
    assert_names(actual["reasons"][0], "champion", "now version 2", "--champion models:/cappy@champion")


def test_a_report_without_the_champion_holds_the_version(env: Any, registered: Any) -> None:
    _, first = registered("a", 1.0)
    env.promote(first)
    _, blind = registered("b", 2.0)
    assert env.promote(blind)["decision"] == "hold"


def test_rollback_gives_the_alias_back_and_refuses_where_nothing_was_before(
    env: Any, registered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RegistryError, match="no such model"):
        registry.rollback("cappy", tracking_uri=env.uri)
    one, first = registered("a", 1.0)
    with raises_naming(RegistryError, "models:/cappy", "no champion"):
        registry.rollback("cappy", tracking_uri=env.uri)
    env.promote(first)
    _, second = registered("b", 2.0, champion=one)
    env.promote(second)
    with pytest.raises(SystemExit) as ended:
        main(["promotion", "--rollback", "--reason", "wrong task", "--tracking-uri", env.uri])
    assert ended.value.code == 0
    assert re.fullmatch(r"models:/cappy@champion .*models:/cappy/1\b.*models:/cappy/2\n", capsys.readouterr().out)
    present = registry.champion("cappy", tracking_uri=env.uri)
    assert present is not None
    assert present.number == 1


def test_a_first_champion_can_be_taken_back_and_does_not_return_by_itself(
    env: Any, registered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = registered("a", 1.0)
    env.promote(first)
    with pytest.raises(SystemExit) as ended:
        main(["promotion", "--rollback", "--tracking-uri", env.uri])
    assert ended.value.code == 0
    expected = "models:/cappy has no champion now: there was none before models:/cappy/1, which stays registered\n"
    assert capsys.readouterr().out == expected
    assert registry.champion("cappy", tracking_uri=env.uri) is None
    assert env.promote(first)["decision"] == "hold"
    assert [(move.kind, move.version, move.former) for move in registry.history("cappy", tracking_uri=env.uri)] == [
        ("promotion", 1, 0),
        ("rollback", 0, 1),
    ]
    _, second = registered("b", 2.0)
    assert env.promote(second)["decision"] == "promote"


def test_a_rollback_tells_the_champion_that_it_took_the_alias_from(
    env: Any, registered: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promotion that was first at the lock has moved the alias by the time that it is the rollback's turn."""
    one, first = registered("a", 1.0)
    env.promote(first)
    two, second = registered("b", 2.0, champion=one)
    env.promote(second)
    _, third = registered("c", 3.0, champion=two)
    alone, others = aliases.lock_alias, [third]

    @contextlib.contextmanager
    def second_at_the_lock(client: Any, name: str) -> Iterator[None]:
        if others:
            env.promote(others.pop())
        with alone(client, name):
            yield

    monkeypatch.setattr(aliases, "lock_alias", second_at_the_lock)
    with pytest.raises(SystemExit):
        main(["promotion", "--rollback", "--json", "--tracking-uri", env.uri])
    assert json.loads(capsys.readouterr().out) == {"champion": "models:/cappy/2", "was": "models:/cappy/3"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--rollback --history", ("--rollback", "--history", "one of them")),
        ("--rollback --dry-run", ("--dry-run", "--rollback", "one of them")),
        ("--history --dry-run", ("--dry-run", "--history", "one of them")),
        ("--version v --report r --target t --name cappy", ("--name has an effect only with --rollback or --history",)),
        ("--version v --report r --target t --reason why", ("--reason has an effect only with --rollback",)),
        ("--version v --report r --dry-run --name other", ("--name has an effect only with --rollback or --history",)),
        ("--history --reason why", ("--reason has an effect only with --rollback",)),
        ("--rollback --version v", ("--rollback does not use --version", "--name")),
        ("--history --report r", ("--history does not use --report", "--name")),
    ],
)
def test_flags_that_would_be_passed_over_are_refused_before_anything_is_read_or_moved(
    words: str, named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["promotion", *words.split(), "--tracking-uri", "http://127.0.0.1:9"])
    assert ended.value.code == 2
    assert_names(capsys.readouterr().err.splitlines()[-1], *named)


@pytest.mark.parametrize(
    ("lows", "expected"),
    [
        ({"random": 0.1, "likelihood": 0.1, "mbr": 0.01}, "promote"),
        ({"random": 0.1, "likelihood": 0.1, "mbr": -0.01}, "hold"),
        ({"random": 0.1, "likelihood": -0.1, "mbr": 0.01}, "hold"),
        ({"random": 0.1, "likelihood": 0.1}, "hold"),
    ],
)
def test_the_strict_gate_asks_for_mbr_too(lows: dict[str, float], expected: str) -> None:
    assert decide(report(None, **lows), has_champion=False, baseline="mbr").decision == expected


def guarded(low: float, champion: bool = True) -> dict[str, Any]:
    result, other = difference(low), difference(-1.0, -0.9)
    row = {"task": "rte", "gain": other if champion else result, "against_champion": result if champion else None}
    return {**report(random=0.1, likelihood=0.1, champion=0.1), "tasks": [row, {"task": "cb", "gain": other}]}


@pytest.mark.parametrize("champion", [True, False])
@pytest.mark.parametrize(
    ("low", "margin", "expected"), [(-0.01, 0.02, "promote"), (-0.03, 0.02, "hold"), (0.0, 0.0, "hold")]
)
def test_a_guarded_task_may_not_be_shown_to_fall(low: float, margin: float, expected: str, champion: bool) -> None:
    decision = decide(guarded(low, champion), has_champion=champion, guards={"rte": margin})
    assert decision.decision == expected
    assert any("On rte" in reason for reason in decision.reasons)


def test_a_task_that_the_report_lacks_cannot_be_guarded() -> None:
    with raises_naming(ConfigError, "'wic'", "cb, rte"):
        decide(guarded(0.0), has_champion=True, guards={"wic": 0.1})


@pytest.mark.parametrize("text", ["rte", "rte=", "=0.1", "rte=-0.1", "rte=2", "rte=nan"])
def test_a_guard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="TASK=MARGIN"):
        parse_guards([text])
    assert parse_guards(["a=b=0.5"]) == {"a=b": 0.5}


def test_hold_leaves_its_evidence(env: Any, registered: Any) -> None:
    _, result = registered("a", leaks={"challenger": 1})
    env.promote(result, baseline="mbr", margin=0.05)
    actual = json.loads((env.folder / "decision-0" / "decision.json").read_text())["basis"]
    assert (actual["baseline"], actual["margin"], actual["leaks"]) == ("mbr", 0.05, {"challenger": 1})
    assert set(actual["comparisons"]) == {"selector-random", "selector-likelihood", "selector-mbr"}


def test_a_dry_run_explains_and_moves_nothing(env: Any, registered: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, result = registered("a")
    version = next(env.folder.glob("version-*"))
    words = ["--version", str(version), "--report", str(result), "--tracking-uri", env.uri]
    with pytest.raises(SystemExit) as ended:
        main(["promotion", "--dry-run", *words])
    assert ended.value.code == 0
    actual = capsys.readouterr().out
    assert_names(actual.splitlines()[0], "would promote", "nothing was moved")
    assert "random choice" in actual.splitlines()[1]
    assert registry.champion("cappy", tracking_uri=env.uri) is None


def test_a_version_that_was_rolled_back_stays_so_until_somebody_forces_it(env: Any, registered: Any) -> None:
    one, first = registered("a", 1.0)
    env.promote(first)
    _, second = registered("b", 2.0, champion=one)
    env.promote(second)
    registry.rollback("cappy", tracking_uri=env.uri)
    again = env.promote(second)
    assert again["decision"] == "hold"
    assert_names(again["reasons"][0], "Version 2", "rolled back", "--force")
    assert env.promote(second, force=True)["decision"] == "promote"
    assert "already champion" in env.promote(second)["reasons"][0]
    registry.rollback("cappy", tracking_uri=env.uri)
    assert env.promote(second)["decision"] == "hold"


def test_force_opens_the_gate_for_nothing_but_a_rollback(env: Any, registered: Any) -> None:
    _, result = registered("a", leaks={"challenger": 1})
    assert env.promote(result, force=True)["decision"] == "hold"


def test_a_version_that_a_rollback_brought_back_is_not_held(env: Any, registered: Any) -> None:
    one, first = registered("a", 1.0)
    env.promote(first)
    _, second = registered("b", 2.0, champion=one)
    env.promote(second)
    registry.rollback("cappy", tracking_uri=env.uri)
    _, third = registered("c", 3.0, champion=one)
    assert env.promote(third)["decision"] == "promote"
    with connect(env.uri) as client:
        versions = {number: registry.resolve(f"models:/cappy/{number}", tracking_uri=env.uri) for number in (1, 2, 3)}
        assert [aliases.was_rolled_back(client, versions[number]) for number in (1, 2, 3)] == [False, True, False]


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([("promotion", 1, 0), ("promotion", 2, 1)], set()),
        ([("promotion", 1, 0), ("promotion", 2, 1), ("rollback", 1, 2)], {2}),
        ([("promotion", 1, 0), ("rollback", 0, 1), ("promotion", 2, 0)], {1}),
        ([("promotion", 1, 0), ("rollback", 0, 1), ("promotion", 1, 0), ("promotion", 2, 1)], set()),
    ],
)
def test_a_version_is_rolled_back_from_the_rollback_to_its_next_promotion(
    moves: list[tuple[str, int, int]], expected: set[int]
) -> None:
    history: Any = [
        aliases.Move(at="", kind=kind, version=version, former=former, by="", why="")  # type: ignore[arg-type]
        for kind, version, former in moves
    ]
    assert {number for number in (1, 2) if aliases.is_rolled_back(number, history)} == expected


def test_the_champion_stays_champion_after_another_selector_of_its_scorer_was_rolled_back(
    env: Any, registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, first = registered("a", 1.0)
    env.promote(first)
    _, second = registered("b", 2.0, champion=one)
    env.promote(second)
    registry.rollback("cappy", tracking_uri=env.uri)
    monkeypatch.setattr(aliases, "same_scorer", lambda client, version: {1, 2} - {version.number})
    assert_names(env.promote(second)["reasons"][0], "Version 2", "rolled back")
    env.register(one, first)
    assert "already champion" in env.promote(first)["reasons"][0]


GROUPS = "".join(f"{number:08x}" for number in range(100))
MORE = "".join(f"{number:08x}" for number in range(101))
HALF = "".join(f"{number:08x}" for number in range(60, 160))
OTHER = "".join(f"{number:08x}" for number in range(100, 200))


@pytest.mark.parametrize(
    ("tested", "attempts"),
    [
        ([GROUPS, GROUPS, GROUPS], [1, 2, 3]),
        ([GROUPS, MORE, GROUPS], [1, 2, 3]),
        ([GROUPS, OTHER, GROUPS], [1, 1, 2]),
        ([GROUPS, GROUPS, OTHER], [1, 2, 1]),
        ([GROUPS, GROUPS, HALF], [1, 2, 2]),
    ],
    ids=["the same groups", "a row more", "other groups between", "a new split", "two that had 40% of the groups"],
)
def test_attempts_are_counted_by_the_groups_that_versions_share(
    env: Any, registered: Any, tested: list[str], attempts: list[int]
) -> None:
    made = []
    for number, groups in enumerate(tested):
        _, result = registered(f"s{number}", float(number), tested_groups=groups, leaks={"challenger": 1})
        env.promote(result)
        made.append(json.loads((env.folder / f"decision-{number}" / "decision.json").read_text())["attempt"])
    assert made == attempts
    assert registry.resolve("models:/cappy/3", tracking_uri=env.uri).tags["cappy.attempt"] == str(attempts[-1])


def test_a_rerun_is_no_further_attempt(env: Any, registered: Any) -> None:
    registered("a")
    other, second = registered("b", 2.0)
    for _ in range(3):
        env.register(other, second)
        env.promote(second)
    actual = [json.loads(path.read_text())["attempt"] for path in env.folder.glob("decision-*/decision.json")]
    assert actual == [2, 2, 2]


def test_attempts_are_not_counted_where_a_person_says_so_and_the_version_says_it(env: Any, registered: Any) -> None:
    registered("a", 1.0)
    _, second = registered("b", 2.0)
    env.promote(second, count_attempts=False)
    assert registry.resolve("models:/cappy/2", tracking_uri=env.uri).tags["cappy.attempt"] == "not counted"


def test_a_decision_says_whether_its_evidence_is_of_the_scorer_or_of_its_recipe(env: Any, registered: Any) -> None:
    _, result = registered("a", folds=5, split="cross-fitted")
    assert env.promote(result)["decision"] == "promote"
    assert json.loads((env.folder / "decision-0" / "decision.json").read_text())["evidence"] == "recipe"
    assert registry.resolve("models:/cappy@champion", tracking_uri=env.uri).tags["cappy.evidence"] == "recipe"


def test_every_move_is_in_the_history_with_who_when_and_why(
    env: Any, registered: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    one, first = registered("a", 1.0)
    assert registry.history("cappy", tracking_uri=env.uri) == []
    env.promote(first)
    _, second = registered("b", 2.0, champion=one)
    env.promote(second)
    env.promote(second)
    registry.rollback("cappy", why="answers got worse", tracking_uri=env.uri)
    moves = registry.history("cappy", tracking_uri=env.uri)
    assert [(move.kind, move.version, move.former) for move in moves] == [
        ("promotion", 1, 0),
        ("promotion", 2, 1),
        ("rollback", 1, 2),
    ]
    assert {move.by for move in moves} == {"anna"}
    assert "beats random choice" in moves[0].why
    assert moves[2].why == "answers got worse"
    assert [move.at for move in moves] == sorted(move.at for move in moves)
    with pytest.raises(SystemExit):
        main(["promotion", "--history", "--tracking-uri", env.uri])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["when", "what", "version", "before", "who", "why"]
    assert "rollback" in table[3]
    assert "answers got worse" in table[3]


def test_the_history_of_a_model_that_is_not_there_is_one_line(env: Any) -> None:
    with raises_naming(RegistryError, "models:/nobody", "no such model"):
        registry.history("nobody", tracking_uri=env.uri)


def test_of_two_promotions_at_once_one_wins_and_the_other_says_so(env: Any, registered: Any) -> None:
    """Both were compared with the first champion, and both are better: whoever is second is held."""
    one, first = registered("a", 1.0)
    env.promote(first)
    rivals = []
    for name, value in (("b", 2.0), ("c", 3.0)):
        _, result = registered(name, value, champion=one)
        version = max(env.folder.glob("version-*"), key=lambda path: int(path.name.partition("-")[2]))
        rivals.append((version, result))
    start = multiprocessing.get_context("spawn").Barrier(2)
    workers = [
        multiprocessing.get_context("spawn").Process(
            target=race.promote,
            args=(start, str(version), str(result), env.uri, str(env.folder / f"parallel-{index}")),
        )
        for index, (version, result) in enumerate(rivals)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    actual = [json.loads((env.folder / f"parallel-{index}" / "decision.json").read_text()) for index in (0, 1)]
    assert sorted(one["decision"] for one in actual) == ["hold", "promote"]
    winner, loser = sorted(actual, key=lambda one: one["decision"], reverse=True)
    assert_names(loser["reasons"][0], "champion", f"now version {winner['version']}")
    present = registry.champion("cappy", tracking_uri=env.uri)
    assert present is not None
    assert present.number == winner["version"]
    assert [move.version for move in registry.history("cappy", tracking_uri=env.uri)] == [1, winner["version"]]


def test_a_lock_that_a_dead_process_left_is_broken_and_a_live_one_waited_for(
    env: Any, registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("a")
    monkeypatch.setattr(aliases, "WAIT_SECONDS", 0.5)
    with connect(env.uri) as client:
        client.create_registered_model(f"cappy{aliases.LOCK}")
        with (
            raises_naming(RegistryError, "models:/cappy@champion", "another promotion"),
            aliases.lock_alias(client, "cappy"),
        ):
            pytest.fail("two held the lock")
        monkeypatch.setattr(aliases, "LOCK_SECONDS", 0.0)
        with aliases.lock_alias(client, "cappy"):
            pass
        assert not client.search_registered_models(f"name LIKE '%{aliases.LOCK}'")


def test_whoever_lost_the_lock_leaves_the_next_ones_alone(env: Any, registered: Any) -> None:
    registered("a")
    lock = f"cappy{aliases.LOCK}"
    with connect(env.uri) as client:
        with aliases.lock_alias(client, "cappy"):
            client.delete_registered_model(lock)
            client.create_registered_model(lock, tags={aliases.OWNER_TAG: "another"})
        assert client.get_registered_model(lock).tags[aliases.OWNER_TAG] == "another"


def test_a_lock_that_is_gone_when_the_move_is_done_is_no_error(env: Any, registered: Any) -> None:
    registered("a")
    with connect(env.uri) as client, aliases.lock_alias(client, "cappy"):
        client.delete_registered_model(f"cappy{aliases.LOCK}")


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"uri": 5}', "[" * 100_000])
def test_a_registration_that_names_no_version_is_one_line(env: Any, text: str) -> None:
    from cappy.errors import FolderError
    from cappy.registry.promotion import read_version_uri

    folder = env.folder / "version"
    folder.mkdir()
    (folder / "version.json").write_text(text)
    write_manifest(folder, Manifest(step="registration", files=describe_files(folder)))
    with pytest.raises(FolderError, match=r"version.json: "):
        read_version_uri(folder)
