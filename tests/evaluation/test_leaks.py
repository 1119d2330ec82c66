"""Leaks are found by prompt, by group and by the text of a row, and what cannot be seen is said."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from wording import assert_names

from cappy.records import Candidate, Instance, write
from cappy.scoring import TRAINED_ON
from cappy.scoring.training_data import (
    GROUPS,
    ROWS,
    count_seen,
    count_seen_by_kind,
    describe_leak_check,
    training_data,
    write_training_data,
)

SYLLABLES = ("ka", "lo", "mi", "ru", "ta", "zo", "be", "du")
WORDS = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]
FIRST = "Read this text and say what it is about: {} So, what is it about?"
SECOND = "{}\nTopic:"


def rows(count: int, seed: int = 0, length: int = 30) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def instances(template: str, texts: Sequence[str], group: str = "{}", split: str = "train") -> list[Instance]:
    return [
        Instance(
            instance_id=f"{split} {number}", instruction=template.format(text), references=("x",), task="t",
            group_id=group.format(number), split=split, candidates=(Candidate(response="x"),),  # type: ignore[arg-type]
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip


def trained(folder: Path, given: Sequence[Instance], start: Path | None = None) -> Path:
    write(folder / "source", given)
    (folder / "scorer").mkdir()
    np.empty(0, dtype="<u8").tofile(folder / "scorer" / TRAINED_ON)
    write_training_data(folder / "scorer", folder / "source", start)
    return folder / "scorer"


def test_a_row_under_another_template_is_a_leak_by_its_group_and_by_its_text(tmp_path: Path) -> None:
    content, texts = "t:{:016x}", rows(40)
    known = training_data(trained(tmp_path, instances(FIRST, texts, content)))
    again = instances(SECOND, texts, content, split="test")
    assert count_seen_by_kind(again, known) == {"prompts": 0, "groups": 40, "rows": 40}
    assert count_seen(again, known) == 40
    other = instances(FIRST, rows(40, seed=1), "u:{:016x}", split="test")
    assert count_seen_by_kind(other, known) == {"prompts": 0, "groups": 0, "rows": 0}
    flat = [replace(one, group_id=f"flat {one.instance_id}") for one in again]
    assert count_seen_by_kind(flat, known) == {"prompts": 0, "groups": 0, "rows": 40}


def test_a_group_of_a_short_row_is_detected_by_its_content_id(tmp_path: Path) -> None:
    content, texts = "t:{:016x}", rows(40, length=2)
    known = training_data(trained(tmp_path, instances(FIRST, texts, content)))
    assert count_seen_by_kind(instances(SECOND, texts, content, split="test"), known) == {
        "prompts": 0,
        "groups": 40,
        "rows": 0,
    }


def test_row_numbers_that_are_equal_by_chance_are_no_leak(tmp_path: Path) -> None:
    known = training_data(trained(tmp_path, instances(FIRST, rows(200))))
    assert count_seen(instances(FIRST, rows(200, seed=1), split="test"), known) == 0


def test_a_group_of_a_users_own_is_detected_where_it_shares_text(tmp_path: Path) -> None:
    passages = rows(40)
    asked = [f"{passage} Who came {number} times?" for number, passage in enumerate(passages)]
    others = [f"{passage[:120]} Which {WORDS[number % 32]} went?" for number, passage in enumerate(passages)]
    known = training_data(trained(tmp_path, instances("{}", asked, "passage {}")))
    assert count_seen(instances("{}", others, "passage {}", split="test"), known) == 40
    assert count_seen(instances("{}", others, "other {}", split="test"), known) == 0


def test_test_instances_of_the_source_are_not_trained_on(tmp_path: Path) -> None:
    held_out = instances(FIRST, rows(40, seed=1), "t:{:016x}", split="test")
    given = [*instances(FIRST, rows(40), "u:{:016x}"), *held_out]
    assert count_seen(held_out, training_data(trained(tmp_path, given))) == 0


def test_what_the_starting_scorer_saw_is_kept(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    early = instances(FIRST, rows(40), "t:{:016x}")
    first = trained(tmp_path / "first", early)
    second = trained(tmp_path / "second", instances(FIRST, rows(40, seed=1), "u:{:016x}"), first)
    assert count_seen_by_kind(early, training_data(second)) == {"prompts": 0, "groups": 40, "rows": 40}


def test_a_scorer_without_groups_and_rows_is_judged_by_prompts_and_it_is_said(tmp_path: Path) -> None:
    from cappy.records import prompt_hash

    given = instances(FIRST, rows(3))
    np.array(sorted(prompt_hash(one.instruction) for one in given), dtype="<u8").tofile(tmp_path / TRAINED_ON)
    known = training_data(tmp_path)
    assert count_seen_by_kind(given, known) == {"prompts": 3}
    checked = dict(describe_leak_check(given, {"champion": known})["champion"])
    assert_names(str(checked.pop("sees")), "only equal prompts", "no groups")
    assert checked == {"found_by_prompts": 3, "prompts": 3}


def test_what_is_known_and_seen_is_described(tmp_path: Path) -> None:
    folder = trained(tmp_path, instances(FIRST, rows(40), "t:{:016x}"))
    assert {GROUPS, ROWS} <= {path.name for path in folder.iterdir()}
    (result,) = describe_leak_check(
        instances(SECOND, rows(5), split="test"), {"challenger": training_data(folder)}
    ).values()
    assert (result["groups"], result["rows"], result["rows_drawn_from"], result["found_by_rows"]) == (40, 40, 40, 5)
    assert "near-duplicates" in str(result["sees"])


def test_no_instances_have_no_leaks() -> None:
    assert count_seen([], np.empty(0, dtype=np.uint64)) == 0
