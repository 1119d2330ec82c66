"""numeric_match sees the number, not its spelling (field-faults C1 to C7)."""

import gzip
import json
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy.annotation.metrics import numeric_match
from cappy.annotation.numbers import last_number

GSM8K = Path(__file__).parents[2].parent / "shared/data/candidates/gsm8k_openai.jsonl.gz"


def grouped(number: int, separator: str) -> str:
    return f"{number:,}".replace(",", separator)


def indian(number: int) -> str:
    head, tail = divmod(number, 1000)
    pairs = []
    while head:
        head, pair = divmod(head, 100)
        pairs.append(f"{pair:02d}" if head else str(pair))
    return ",".join([*reversed(pairs), f"{tail:03d}" if number >= 1000 else str(tail)])


SPELLINGS: dict[str, Callable[[int], str]] = {
    "plain": str,
    "commas": lambda number: grouped(number, ","),
    "latex braces": lambda number: grouped(number, "{,}"),
    "latex negative space": lambda number: grouped(number, ",\\!"),
    "latex thin space": lambda number: grouped(number, "\\,"),
    "latex thin space in braces": lambda number: grouped(number, "{\\,}"),
    "latex space": lambda number: grouped(number, "\\ "),
    "space": lambda number: grouped(number, " "),
    "no-break space": lambda number: grouped(number, "\u00a0"),
    "narrow no-break space": lambda number: grouped(number, "\u202f"),
    "thin space": lambda number: grouped(number, "\u2009"),
    "points": lambda number: grouped(number, ".") if number >= 10**6 else str(number),
    "points and decimal comma": lambda number: f"{grouped(number, '.')},0" if number >= 1000 else str(number),
    "apostrophes": lambda number: grouped(number, "'"),
    "typographic apostrophes": lambda number: grouped(number, "\u2019"),
    "underscores": lambda number: grouped(number, "_"),
    "indian": indian,
    "decimals": lambda number: f"{number:,}.00",
    "scientific": lambda number: f"{number}e0",
    "over one": lambda number: f"\\frac{{{number}}}{{1}}",
    "arabic digits": lambda number: "".join(chr(0x660 + int(digit)) for digit in str(number)),
    "devanagari digits": lambda number: "".join(chr(0x966 + int(digit)) for digit in str(number)),
    "full-width digits": lambda number: "".join(chr(0xFF10 + int(digit)) for digit in str(number)),
    "full-width commas": lambda number: grouped(number, "\uff0c"),
}
FRAMES = (
    "{}", "The total is ${}$.", "The total is ${}.", "\\${} in all", "\\boxed{{{}}}", "$\\boxed{{{}}}$ in 3 steps.",
    "\\boxed{{\\text{{{}}}}}", "**{}**", "#### {}", "it is {}%", "{}\\%", "\\({}\\)", "{} m^2", "{} m²", "{} cm3",
    "{}\\,\\text{{m}}^2", "{} m<sup>2</sup>", "{} s^{{-1}}", "{} g of CO2", "{} g of H_2O", "{} g of H₂O", "{}kg",
    "USD{}", "Rs.{}", "No. {}", "No.{}", "€{}", "3 + 4 = {}", "1, 2, {}", "step 1:\n{}\nand so on", "答案是{}个",
)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@given(number=st.one_of(st.integers(0, 2_000), st.integers(0, 10**12)), other=st.integers(0, 10**12), data=st.data())
def test_every_spelling_of_an_integer_is_that_integer_and_no_other(
    spelling: str, number: int, other: int, data: st.DataObject
) -> None:
    """C1, C2, C3, C4, C5, C7: right in whatever sentence, as the reference and as the response."""
    text = data.draw(st.sampled_from(FRAMES)).format(SPELLINGS[spelling](number))
    reference = data.draw(st.sampled_from(sorted(SPELLINGS.items())))[1]
    tail = int(str(number)[-3:])
    assert (numeric_match([str(number)], text), numeric_match([text], reference(number))) == (1.0, 1.0)
    for wrong in {other, tail, number + 1, number * 1000} - {number}:
        assert (numeric_match([str(wrong)], text), numeric_match([text], reference(wrong))) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        pytest.param("9500", "The total is $9{,}500$.", 1.0, id="C1"),
        pytest.param("500", "The total is $9{,}500$.", 0.0, id="C2"),
        pytest.param("12,\\!345", "12,345", 1.0, id="C3"),
        pytest.param("12,\\!345", "345", 0.0, id="C3-other"),
        pytest.param("1 000 000", "1,000,000", 1.0, id="C4"),
        pytest.param("1\u202f000\u202f000", "2\u202f000\u202f000", 0.0, id="C4-other"),
        pytest.param("1.000.000", "2.000.000", 0.0, id="C5"),
        pytest.param("5", "The area is 5 m^2.", 1.0, id="C6"),
        pytest.param("1,00,000", "100000", 1.0, id="C7"),
    ],
)
def test_the_cases_from_the_field(reference: str, response: str, expected: float) -> None:
    assert numeric_match([reference], response) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # Ambiguous alone, so read as English has it.
        ("1.000", "1"), ("1,000", "1000"), ("12.345", "12.345"),
        # A decimal comma, but not in a pair or a longer list.
        ("3,5", "3.5"), ("0,125", "0.125"), ("1 000,50 €", "1000.5"), ("1.000,50", "1000.5"), ("(3,5)", "5"),
        ("1,2,3", "3"), ("1, 2, 3", "3"), ("2010,2011", "2011"), ("in 2010, 2011 and 2012", "2012"),
        ("1.5,2.25", "2.25"), ("\\boxed{3,5}", "3.5"), ("\\{3,5\\}", "5"),
        # Signs.
        ("x = −5", "-5"), ("- 5", "5"), ("= - 5", "-5"), ("-$5", "-5"), ("$-5$", "-5"), ("3-5", "5"), ("3–5", "5"),
        ("$5-$10", "10"), ("10%-20%", "20"), ("(-5)", "-5"), ("-\\frac{1}{2}", "-0.5"), ("–5", "-5"), ("**-5**", "-5"),
        # Dates, times, versions: the last of their numbers.
        ("2024-05-12", "12"), ("12/05/2024", "2024"), ("12.05.2024", "2024"), ("May 5, 2024", "2024"), ("5:30", "30"),
        ("1.2.3", "3"),
        # Powers of ten and others; an exponent of a word is none.
        ("1.5e6", "1500000"), ("1.5 × 10^6", "1500000"), ("1.5 \\times 10^{6}", "1500000"), ("1.5·10⁶", "1500000"),
        ("1.5\\cdot10^{-1}", "0.15"), ("10^6", "1000000"), ("2^{10}", "1024"), ("10**6", "1000000"), ("-2^2", "-4"),
        ("5 x^{10}", "5"), ("x^2 = 9", "9"), ("5 m**2", "5"), ("90^\\circ", "90"), ("5^{\\text{th}}", "5"),
        ("3,14159", "3.14159"), ("$5k", "5000"), ("-€2.5M", "-2500000"), ("$3bn", "3000000000"), ("5k", "5000"),
        ("$5 m", "5"),
        ("5 m^{\\text{2}}", "5"), ("5 x^{2n+1}", "5"), ("9.8\\frac{m}{s^2}", "9.8"), ("\\SI{5}{m^2}", "5"),
        ("5 m/s²", "5"),
        ("2 million", "2000000"), ("$2.5 million dollars", "2500000"), ("2 millionaires", "2"), ("1 lakh", "100000"),
        # Words with digits.
        ("COVID-19", "19"), ("22nd", "22"), ("5 kg of NaCl2", "5"), ("v1.2", None), ("H2O", None), ("3x5", "5"),
        ("\\times5", "5"), ("log_2 8", "8"), ("seven", None), ("", None), ("...", None), ("①", None),
        ("5\u200b0", "50"),
        # A box before whatever stands after it, and none that holds no number.
        ("\\boxed{\\frac{3}{4}} by step 2", "0.75"), ("\\boxed{x} 7", "7"), ("\\boxed{1} \\boxed{{2}", "2"),
        # GSM8K's calculator notes and markers.
        ("9 * 2 = $<<9*2=18>>18", "18"), ("#### 72", "72"), ("2010 8/4", "2"), ("1.5 1/2", "0.5"),
        ("5 1/0", "5"), ("0^-1", "0"), ("A: 18", "18"), (".5", "0.5"), ("$.50", "0.5"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("text", ["1/3", "\\frac{1}{3}", "\\dfrac13", "⅓", "2 / 6", "1⁄3"])
def test_a_fraction_is_one_number(text: str) -> None:
    assert last_number(text) == Fraction(1, 3)
    assert numeric_match(["1/3"], text) == 1.0
    assert numeric_match(["2/3"], text) == numeric_match(["3"], text) == 0.0


@pytest.mark.parametrize("text", ["1 3/4", "1¾", "1\\frac{3}{4}", "7/4", "1.75", "1 \\tfrac34"])
def test_a_mixed_number_is_one_number(text: str) -> None:
    assert last_number(text) == Fraction(7, 4)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("70k", "70000"), ("70K", "70000"), ("1.5k", "1500"), ("It costs 70k.", "70000"), ("70k people", "70000"),
        ("about 70K–100K", "100000"), ("-5k", "-5000"), ("**12k**", "12000"), ("$70k", "70000"), ("70k$", "70000"),
        ("5 km", "5"), ("5 k", "5"), ("5 K", "5"), ("70kg", "70"),
        ("4k videos", "4"), ("4K video", "4"), ("8K TV", "8"),
        ("his 401k", "401"), ("the temperature is 300K", "300"), ("300K (kelvin)", "300"), ("2M", "2"), ("5m", "5"),
        ("$2M", "2000000"), ("70k2", "70"), ("\\boxed{70k}", "70000"), ("1,5k", "1500"),
    ],
)  # fmt: skip
def test_a_k_beside_the_digits_is_a_thousand(text: str, number: str) -> None:
    """C's brother: as 2 million and $2M are read."""
    assert last_number(text) == Decimal(number)
    assert numeric_match([text], text) == numeric_match([number], text) == 1.0


@pytest.mark.parametrize("text", ["9~500", "$9~500$", "\\boxed{9~500}", "9~500~kg", "9~500.0", "costs~9~500"])
def test_a_tie_between_digits_groups_them_as_a_space_does(text: str) -> None:
    assert last_number(text) == 9500
    assert numeric_match(["500"], text) == numeric_match([text], "500") == 0.0
    assert last_number("9~50") == 50


ROOTS = {
    "√2": ("\\sqrt{2}", "\\sqrt2", "\\sqrt 2", "√2", "√(2)", "√ 2", "sqrt(2)", "$\\boxed{\\sqrt{2}}$", "\\sqrt[2]{2}"),
    "√18": ("3\\sqrt{2}", "3√2", "3 * sqrt(2)", "3 \\times \\sqrt{2}", "3\\cdot\\sqrt{2}", "\\sqrt{18}"),
    "√2/2": ("\\frac{\\sqrt{2}}{2}", "\\dfrac{1}{\\sqrt{2}}", "√(1/2)", "\\sqrt{\\frac{1}{2}}", "1/√2"),
    "-√3": ("-\\sqrt{3}", "x = -√3", "$-\\sqrt{3}$"),
}


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_is_not_the_number_under_it(root: str) -> None:
    for text in (root, *ROOTS[root]):
        assert numeric_match([root], text) == 1.0, text
        for wrong in ("2", "3", "18", "1", "1/2", *(other for other in ROOTS if other != root)):
            assert (numeric_match([wrong], text), numeric_match([text], wrong)) == (0.0, 0.0), (wrong, text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\\sqrt{16}", "4"), ("√16", "4"), ("2√9", "6"), ("√16 = 4", "4"), ("√0.25", "0.5"),
        ("√2 is about 1.41", "1.41"),
        ("x = 2, so \\boxed{\\sqrt{x}}", None), ("\\sqrt[3]{5}", None), ("∛5", None), ("\\sqrt{x^{2}+1}", None),
        ("√(x + 2)", None), ("√x", None), ("√", None), ("√2/0", None), ("\\sqrt[3]{8} = 2", "2"),
    ],
)  # fmt: skip
def test_a_root_of_a_square_is_a_number_and_one_of_no_number_is_none(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_a_comma_of_the_response_may_be_a_decimal_comma_or_a_lists() -> None:
    assert [numeric_match([reference], "1,2") for reference in ("1.2", "1,2", "2", "12")] == [1.0, 1.0, 1.0, 0.0]
    assert numeric_match(["3,5"], "5") == 0.0


def test_division_by_zero_and_numbers_beyond_all_bounds_are_no_error() -> None:
    assert last_number("5/0") == 5
    long = "7" * 10_000
    assert numeric_match([long], f"{long} million") == 1.0
    assert numeric_match([long], long[1:] + "8") == 0.0
    assert numeric_match(["9" * 40], "-" + "9" * 40) == 0.0
    assert numeric_match(["-1" + "0" * 40], "-1" + "0" * 39 + "1") == 0.0
    assert last_number("1e99999999") is not None


@given(st.text(max_size=80) | st.text(alphabet="0123456789.,'/ ^{}()-+\\_*$exm²½√k~", max_size=60))
def test_no_text_is_an_error(text: str) -> None:
    assert numeric_match([text], text) == float(last_number(text) is not None)


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "1",
        "1 ",
        "1,",
        "1,000",
        "111 ",
        "1/",
        "1^",
        "{",
        "\\boxed{",
        "\\frac{1}",
        "_{",
        "-",
        "*",
        "½",
        "a1.",
        "√",
        "2√",
        "√(",
        "1~",
        "1k",
        "\\sqrt{",
        "\\frac{√2}",
    ],
)
def test_a_hostile_text_takes_linear_time(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    started = time.monotonic()
    last_number(text + "x")
    last_number(text + "1")
    assert time.monotonic() - started < 5.0


def test_labels_of_gsm8k_are_the_published_ones() -> None:
    if not GSM8K.is_file():
        pytest.skip("shared/data is not beside this checkout")
    with gzip.open(GSM8K, "rt") as file:
        rows = [json.loads(line) for line in file]
    pairs = [(row["references"], one) for row in rows for one in row["candidates"]]
    assert all(bool(numeric_match(references, one["text"])) == one["correct"] for references, one in pairs)
