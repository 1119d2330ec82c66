"""The built-in tasks are tasks: distinct, kept apart, the same everywhere, and their answers are right."""

import re
import subprocess
import sys
from datetime import date, datetime
from itertools import combinations

import pytest
from wording import raises_naming

from cappy.builtin.tasks import FAMILIES, POOLS, Pool, instances
from cappy.builtin.vocabulary import CATEGORIES, VERBS
from cappy.errors import ConfigError
from cappy.records import Instance, prompt_hash


def drawn(pool: Pool = "adaptation", number: int = 60, **values: object) -> list[Instance]:
    return list(instances(pool, num_per_family=number, **values))  # type: ignore[arg-type]


def of(family: str, number: int = 80) -> list[Instance]:
    return drawn(number=number, families=(family,))


def test_there_are_enough_families_of_both_kinds_and_some_are_held_out() -> None:
    kinds = [family.kind for family in FAMILIES.values()]
    held_out = [family.kind for family in FAMILIES.values() if family.held_out]
    assert len(kinds) >= 12
    assert kinds.count("classification") >= 4
    assert {"generation", "classification"} == set(held_out)
    assert all(len(set(family.templates)) >= 4 for family in FAMILIES.values())


def test_no_two_pools_and_no_two_splits_share_a_prompt() -> None:
    sets: dict[tuple[str, str], set[int]] = {}
    for seed in (0, 1):
        for pool in POOLS:
            for instance in drawn(pool, 150, seed=seed):
                sets.setdefault((pool, instance.split), set()).add(prompt_hash(instance.instruction))
    assert {pool for pool, _ in sets} == set(POOLS)
    assert ("adaptation", "test") in sets
    for one, other in combinations(sets, 2):
        assert not sets[one] & sets[other], (one, other)


def test_instances_are_distinct_and_every_family_gives_its_number() -> None:
    rows = drawn(number=50)
    assert len({prompt_hash(row.instruction) for row in rows}) == len(rows) == 50 * len(FAMILIES)
    assert len({row.instance_id for row in rows}) == len(rows)


def test_a_family_that_cannot_give_so_many_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cappy.builtin.tasks._MAX_MISSES", 40)
    with pytest.raises(ConfigError, match=r"number_words.*smaller"):
        drawn(number=1_000_000, families=("number_words",))


def test_draws_are_the_same_in_every_process_and_differ_by_seed() -> None:
    program = (
        "from cappy.builtin.tasks import instances\n"
        "print([i.instruction for i in instances('adaptation', num_per_family=3, seed=5)])"
    )
    actual = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(actual) == 1
    assert eval(actual.pop()) == [row.instruction for row in drawn(number=3, seed=5)]
    assert drawn(number=3, seed=5) != drawn(number=3, seed=6)


def test_held_out_families_are_kept_from_pretraining() -> None:
    held_out = {name for name, family in FAMILIES.items() if family.held_out}
    assert not held_out & {row.task for row in drawn("pretraining", 2)}
    assert held_out <= {row.task for row in drawn("llm", 2)}
    with raises_naming(ConfigError, next(n for n in FAMILIES if n in held_out), "held out"):
        drawn("pretraining", 2, families=tuple(n for n in FAMILIES if n in held_out))


def test_a_choice_is_right_and_no_choice_is_there_twice() -> None:
    for row in drawn():
        if FAMILIES[row.task].kind == "classification":
            assert set(row.references) <= set(row.choices)
            assert len(set(row.choices)) == len(row.choices) >= 2
        else:
            assert not row.choices


def test_sorted_words_are_sorted_and_come_from_the_instruction() -> None:
    for row in of("word_sorting"):
        words = row.references[0].split()
        assert words == sorted(words)
        assert all(re.search(rf"\b{word}\b", row.instruction) for word in words)


def test_reversed_lists_stand_in_the_instruction_the_other_way_round() -> None:
    for row in of("list_reversal"):
        words = row.references[0].split(", ")
        assert ", ".join(reversed(words)) in row.instruction


def test_filtered_words_are_of_the_category_and_none_is_missing() -> None:
    for row in of("category_filtering"):
        wanted = next(name for name in CATEGORIES if re.search(rf"\b{name}\b", row.instruction))
        members = [word for word in re.findall(r"[a-z]+", row.instruction) if word in CATEGORIES[wanted]]
        assert members == row.references[0].split(", ")


def test_dates_mean_the_same_day_in_both_notations() -> None:
    formats = ("%B %d, %Y", "%d %B %Y", "%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y")

    def days(text: str) -> set[date]:
        result = set()
        for pattern in formats:
            for part in re.findall(
                r"\d{4}-\d{2}-\d{2}|\d{1,2}/\d{1,2}/\d{4}|[A-Z][a-z]+ \d{1,2}, \d{4}|\d{1,2} [A-Z][a-z]+ \d{4}", text
            ):
                try:
                    result.add(datetime.strptime(part, pattern).date())
                except ValueError:
                    continue
        return result

    for row in of("date_formats"):
        assert days(row.references[0]) & days(row.instruction), row


def test_number_words_count_back_to_the_number() -> None:
    units = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
    units += "sixteen seventeen eighteen nineteen".split()
    tens = {
        word: 10 * (i + 2) for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())
    }
    for row in of("number_words"):
        total = current = 0
        for word in row.references[0].replace("-", " ").split():
            if word == "hundred":
                current *= 100
            elif word == "thousand":
                total, current = total + current * 1000, 0
            else:
                current += tens.get(word, units.index(word) if word in units else 0)
        assert str(total + current) in row.instruction.replace(",", "")


def test_the_past_tense_uses_the_past_form_of_the_verb() -> None:
    past = {forms[1]: forms[2] for forms in VERBS}
    for row in of("tense_change", 30):
        present = next(word for word in row.instruction.split() if word in past)
        if "past" in row.instruction:
            assert past[present] in row.references[0].split()


def test_comparisons_are_decided_by_the_numbers() -> None:
    for row in of("comparison"):
        numbers = {name: int(re.search(rf"{name}\D*?(\d+)", row.instruction).group(1)) for name in row.choices}  # type: ignore[union-attr]
        assert row.references[0] in (max(numbers, key=numbers.get), min(numbers, key=numbers.get))  # type: ignore[arg-type]
        assert len(set(numbers.values())) == 2


def test_the_odd_one_out_is_of_another_category() -> None:
    category = {word: name for name, words in CATEGORIES.items() for word in words}
    for row in of("odd_one_out"):
        odd = row.references[0]
        others = {category[word] for word in row.choices if word != odd}
        assert len(others) == 1
        assert category.get(odd) not in others
