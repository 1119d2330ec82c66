"""The gate: a table of its decisions, and what it does to the aliases."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from cappy import registry
from cappy.cli import main
from cappy.errors import RegistryError
from cappy.registry.promotion import decide


def report(leaks: Mapping[str, int] | None = None, **lows: float) -> dict[str, Any]:
    comparisons = {
        f"scorer-{name}": {"difference": low + 0.05, "low": low, "high": low + 0.1, "probability": 0.9}
        for name, low in lows.items()
    }
    return {"comparisons": comparisons, "leaks": leaks or {"challenger": 0}}


@pytest.mark.parametrize(
    ("found", "has_champion", "margin", "expected"),
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
    ],
)
def test_the_gate_opens_only_for_what_is_proven(
    found: dict[str, Any], has_champion: bool, margin: float, expected: str
) -> None:
    decision = decide(found, has_champion=has_champion, margin=margin)
    assert decision.decision == expected
    assert decision.reasons
    assert all(reason.endswith(".") for reason in decision.reasons)


def test_reasons_name_the_comparison_the_interval_and_the_leak() -> None:
    reasons = decide(report({"challenger": 3}, random=-0.02, mbr=0.01), has_champion=False).reasons
    assert reasons[0].startswith("The challenger was trained on 3 of the reported prompts")
    expected = "The scorer is not proven to beat random choice: difference +3.0 (95% interval -2.0 to +8.0, x100)."
    assert reasons[1] == expected
    assert reasons[2].startswith("For information: against MBR")


def test_a_promoted_version_is_champion_and_challenger_no_more(room: Any, registered: Any) -> None:
    _, found = registered("a")
    told = room.promote(found)
    assert (told["decision"], told["serve"]) == ("promote", "cappy serve --scorer models:/cappy@champion")
    assert json.loads((room.folder / "decision-0" / "decision.json").read_text())["version"] == 1
    assert registry.resolve("models:/cappy@champion", tracking_uri=room.uri).aliases == ("champion",)


def test_a_held_version_stays_challenger_and_can_be_served(room: Any, registered: Any) -> None:
    _, found = registered("a", leaks={"challenger": 1})
    told = room.promote(found)
    assert (told["decision"], told["serve"]) == ("hold", "cappy serve --scorer models:/cappy@challenger")
    assert registry.champion("cappy", tracking_uri=room.uri) is None


def test_promotion_told_twice_stays_promoted(room: Any, registered: Any) -> None:
    _, found = registered("a")
    room.promote(found)
    again = room.promote(found)
    assert again["decision"] == "promote"
    assert again["reasons"] == ["Version 1 is already champion."]


def test_a_champion_that_moved_since_the_report_holds_the_version(room: Any, registered: Any) -> None:
    one, first = registered("a", 1.0)
    room.promote(first)
    _, second = registered("b", 2.0, champion=one)
    room.promote(second)
    _, late = registered("c", 3.0, champion=one)
    told = room.promote(late)
    assert told["decision"] == "hold"
    assert "The champion is now version 2" in told["reasons"][0]
    assert "run the pipeline again" in told["reasons"][0]


def test_a_report_without_the_champion_holds_the_version(room: Any, registered: Any) -> None:
    _, first = registered("a", 1.0)
    room.promote(first)
    _, blind = registered("b", 2.0)
    assert room.promote(blind)["decision"] == "hold"


def test_rollback_gives_the_alias_back_and_refuses_where_nothing_was_before(
    room: Any, registered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one, first = registered("a", 1.0)
    room.promote(first)
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.rollback("cappy", tracking_uri=room.uri)
    _, second = registered("b", 2.0, champion=one)
    room.promote(second)
    with pytest.raises(SystemExit) as ended:
        main(["rollback", "--tracking-uri", room.uri])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "models:/cappy@champion is models:/cappy/1 again, it was models:/cappy/2\n"
    present = registry.champion("cappy", tracking_uri=room.uri)
    assert present is not None
    assert present.number == 1
