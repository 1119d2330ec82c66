"""Parses the last number of a text: LaTeX, digit grouping, powers, fractions, digits of any script."""

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from math import isqrt

Number = Decimal | Fraction

MAX_DIGITS = 1_000
"""Maximum digits of a number for arithmetic; longer numbers are only compared."""
_MAX_CACHED_CHARACTERS = 4_096
_TAIL = 80
"""Characters at the end of a long line that are read first."""
_BETWEEN_WORDS = re.compile("[a-z] [a-z]")
_LETTER = "A-Za-zÀ-ÖØ-öø-ɏͰ-Ͽ"
_CURRENCIES = "USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|HKD|SGD|BRL|Rs|RS"
_CURRENCY = "$£€¥₹₩₽₺฿₫₪₴₦"
_DIGITS = r"(?>[0-9]+(?:[.,'_][0-9]+)*)"
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5,
    "crore": 10**7, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}
_SIGN = r"(?:(?<![\w%)\]}°'£€¥₹₩₽₺฿₫₪₴₦])(?<![0-9]\$)(?P<NAME>[-+]))?"
_VIDEO_WORDS = "video|resolution|display|screen|monitor|tv|television|uhd|ultra|hdr|camera|footage|film|movie|image"
"""Words that make 4K before them a resolution, not 4,000."""

_TOKEN = re.compile(
    rf"""
    # Digits inside a word (CO2, H2O, cm3, v1.2) are not a number; those of 3x5 and USD500 are.
    (?<![{_LETTER}]) (?! (?<=[0-9])x[0-9] | (?:{_CURRENCIES})[0-9] ) [{_LETTER}]+[0-9][{_LETTER}0-9]*(?:[.,][0-9]+)*
    # An exponent of something other than a number: m^2, (a+b)^2, s**2; but **2** is bold.
    | \^\s?(?:\{{[^{{}}]{{0,40}}\}}|[\s({{]{{0,4}}[-+]?[0-9][0-9.,/]*[)}}]?) | (?<=[\w)])\*\*\(?[-+]?[0-9]++(?!\*\*)\)?
    | (?P<date>[0-9]++(?:/[0-9]++){{2,}}+)
    # A square root, its multiplier (3√2) or dividend (3/√2), and its divisor (√2/2).
    # The group `radicand` is empty if the root is of something other than a number.
    | {_SIGN.replace("NAME", "rootsign")}(?:(?P<multiplier>{_DIGITS})\s?(?P<operator>[*·⋅×/]?)\s?)?√\s?
      (?P<radicand>{_DIGITS}|\({_DIGITS}/[0-9]++\))?(?:\s?/\s?(?P<divisor>[0-9]++))?
    | {_SIGN.replace("NAME", "sign")}(?P<currency>[{_CURRENCY}])?
      (?P<digits>{_DIGITS}|(?<![\w.])\.[0-9]+)
      (?:
        [eE](?P<exponent>[-+]?[0-9]{{1,4}}+)(?![0-9{_LETTER}])
        | \s?[x×*·⋅]\s?10\s?(?:\^|\*\*)\s?[({{]?(?P<power_of_ten>[-+]?[0-9]{{1,4}}+)[)}}]?(?![0-9])
        | \s?(?:\^\s?|\*\*(?![0-9]+\*\*))[({{]?(?P<power>[-+]?[0-9]{{1,3}}+)[)}}]?(?![0-9])
        | \s?/\s?(?P<denominator>{_DIGITS})
        | [ ](?P<numerator>[0-9]++)/(?P<mixed_denominator>[0-9]++)(?!/)
      )?
      (?:[\s({{-]{{0,2}}(?P<scale>{"|".join(_SCALES)})s?(?![{_LETTER}])
        |(?P<suffix>[kK](?![ -](?i:{_VIDEO_WORDS})s?\b)|(?(currency)[mMbB]n?|(?!)))(?![{_LETTER}]|[0-9]))?
    """,
    re.VERBOSE,
)
_GROUPED = re.compile(
    r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"
    r"|[1-9][0-9]{0,2}(?:['_][0-9]{3})+(?:\.[0-9]+)?"
)
_DECIMAL_COMMA = re.compile(
    r"[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}(?:,[0-9]+)?|[1-9][0-9]{0,2}(?:[.'][0-9]{3})+,[0-9]+|0,[0-9]+|[0-9]+,[0-9]{1,2}"
    r"|[0-9]{1,3},[0-9]{4,}"
)
_PLAIN = re.compile(r"[0-9]*\.?[0-9]+")
_SPACED = re.compile(r"(?<![0-9])(?<![0-9][.,'/_])[1-9][0-9]{0,2}(?:(?: [0-9]{3})++|(?:\u00a0[0-9]{3})++)(?![0-9])")
_AFTER_EQUALS = re.compile(r"=\s*-\s+(?=[0-9])")
_SUBSCRIPT = re.compile(r"(?<=[A-Za-z)\]}])_(?:\{[^{}]{0,40}\}|[0-9]+)")
_TIE = re.compile("(?<=[0-9])~(?=[0-9])")
_LATEX_ROOT = re.compile(
    r"\\sqrt(?![A-Za-z])\s*(?:\[([^\[\]]{0,20})\])?\s*(?:\{((?:[^{}]|\{[^{}]{0,40}\}){0,200})\}|([0-9]))"
)
_ROOT = re.compile(r"(?:√|(?<![A-Za-z])sqrt\s?(?=[({]))\s?[({]([^(){}]{0,80})[)}]")
_OTHER_ROOT = re.compile(r"[∛∜]\s?(?:\([^()]{0,80}\)|[0-9.,]+)?")
_RADICAND = re.compile(r"\s*([0-9][0-9.,]*(?:/[0-9]+)?)\s*")
_ROOT_FRACTION = re.compile(
    r"\\(?:[dtcs]?frac|nicefrac)\s*\{\s*([-0-9.,]*\s?√[0-9./]*)\s*\}\s*\{\s*([0-9]+)\s*\}"
    r"|\\(?:[dtcs]?frac|nicefrac)\s*\{\s*(-?[0-9][0-9.,]*)\s*\}\s*\{\s*(√[0-9./]*)\s*\}"
)
_KELVIN = re.compile("temperature|kelvin|°", re.IGNORECASE)
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_HTML = re.compile(r"<sup>\s*([-+]?[0-9]+)\s*</sup>|<sub>[^<]{0,20}</sub>")
_LATEX_SEPARATOR = re.compile(r"\{\s*(\\[,;:! ]|[,.'])\s*\}|\\text\{([,.])\}")
_LATEX_FRACTION = re.compile(
    r"([0-9])?\\(?:[dtcs]?frac|nicefrac)\s*(?:\{\s*(-?[0-9][0-9,.]*)\s*\}|([0-9]))"
    r"\s*(?:\{\s*([0-9][0-9,.]*)\s*\}|([0-9]))"
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_number(text: str) -> Number | None:
    """The last number of a text, or None; if the text has a LaTeX `\\boxed{}`, the last number in the last box.

    How spellings are read:

    - Thousands may be grouped by commas (1,000; Indian 1,00,000), spaces of any width and ties (1 000; 1~000),
      apostrophes, underscores and, if unambiguous, points (1.000.000; 1.000,50). A single 1.000 is 1.
    - A single comma is a decimal comma if it is not followed by exactly three digits, or if it follows a lone 0 (3,5;
      0,125), except in brackets: (3,5) is a pair. In 1,2,3 and 1, 2, 3 each is a separate number, as are the parts of a
      date, a time, a range and a version.
    - 3/4, \\frac{3}{4}, ¾ and 1 3/4 are one number; so are 1.5e6, 1.5 × 10^6, 10^6, 2 million and $2M.
    - 70k and 70K are 70,000 if the letter follows the digits directly: 5 k and 5 km are 5. Exceptions are 4K video, a
      401k, and 300K in a line about temperatures.
    - Roots are evaluated: \\sqrt{16} is 4, and √2, 3√2 and \\frac{\\sqrt{2}}{2} are not 2; √x is not a number.
    - A minus sign counts at the start, or after white space, an opening bracket or an operator.
    - Digits within a word (CO2, H2O, cm3), subscripts, and exponents of units and variables (m^2, m²) are not numbers.
    - Units and signs next to a number (%, $, kg, th) are ignored.
    - Digits of every script are read; number words and Roman numerals are not.
    """
    return last_number_readings(text)[0]


def last_number_readings(text: str) -> tuple[Number | None, ...]:
    """The possible values of the last number; the first is what `last_number` returns.

    For example, 1,2 may be 1.2, or a list whose last number is 2.
    """
    return _cached_readings(text) if len(text) <= _MAX_CACHED_CHARACTERS else _last_number_readings(text)


def _last_number_readings(text: str) -> tuple[Number | None, ...]:
    boxed = _find_last_box(text)
    for part in (boxed, text):
        # A number does not span lines, so reading stops at the last line with a number.
        for line in reversed(part.splitlines()):
            if numbers := _read_line(line):
                return numbers
    return (None,)


_cached_readings = lru_cache(maxsize=8_192)(_last_number_readings)


def _read_line(line: str) -> tuple[Number | None, ...]:
    if len(line) > 2 * _TAIL and (gap := _BETWEEN_WORDS.search(line, len(line) - _TAIL)):
        # A number does not span two words, and most lines have two adjacent words near their end, so the text after
        # them is parsed first, and the whole line only if no number is in that text.
        return _read_last(line[gap.end() - 1 :]) or _read_last(line)
    return _read_last(line)


def _read_last(line: str) -> tuple[Number | None, ...]:
    plain = _normalize(line)
    last = None
    for match in _TOKEN.finditer(plain):
        if match["digits"] or match["date"] or "√" in match[0]:
            last = match
    return tuple(_interpret_match(last)) if last is not None else ()


def _interpret_match(match: re.Match[str]) -> Iterator[Number | None]:
    """Yields the possible values of a match; None for a root of something that is not a number."""
    if "√" in match[0]:
        yield _evaluate_root(match)
        return
    if match["date"]:
        yield Decimal(match["date"].rpartition("/")[2])
        return
    start, end = match.span("digits")
    pair = match.string[start - 1 : start] in ("(", "[") and match.string[end : end + 1] in (")", "]")
    plain, last_item = _parse_decimal(match["digits"], pair=pair)
    yield _evaluate(plain, match)
    if last_item is not None:
        yield last_item


def _parse_decimal(digits: str, *, pair: bool = False) -> tuple[str, Decimal | None]:
    """Returns the digits with a decimal point as the only separator.

    The second value is the last number if the commas may also separate a list (1,2), otherwise None.
    """
    if _PLAIN.fullmatch(digits):
        return digits, None
    if _GROUPED.fullmatch(digits):
        return re.sub("[,'_]", "", digits), None
    *_, last = re.split("[,'_]", digits)
    whole, _, decimals = digits.partition(",")
    if _DECIMAL_COMMA.fullmatch(digits) and not (pair and whole.isdigit()):
        plain = whole.replace(".", "").replace("'", "")
        return f"{plain}.{decimals or 0}", Decimal(last) if whole.isdigit() and whole != "0" else None
    return last if last.count(".") < 2 else last.rpartition(".")[2], None


def _evaluate_root(match: re.Match[str]) -> Number | None:
    """The value of a root with its factors.

    It is exact if it is rational, else rounded, so that equal roots give equal values.
    """
    if not match["radicand"] or len(match[0]) > MAX_DIGITS:
        return None
    digits, _, denominator = match["radicand"].strip("()").partition("/")
    if denominator and not int(denominator):
        return None
    radicand = Fraction(_parse_decimal(digits)[0]) / int(denominator or 1)
    multiplier = Fraction(_parse_decimal(match["multiplier"])[0]) if match["multiplier"] else Fraction(1)
    divisor = int(match["divisor"] or 1)
    if not divisor or (match["operator"] == "/" and not radicand):
        return None
    value_squared = (multiplier / divisor) ** 2 * (1 / radicand if match["operator"] == "/" else radicand)
    product = value_squared.numerator * value_squared.denominator
    root = isqrt(product)
    if root * root == product:
        value: Number = Fraction(root, value_squared.denominator)
    else:
        value = (Decimal(value_squared.numerator) / Decimal(value_squared.denominator)).sqrt()
    return -value if match["rootsign"] == "-" else value


def _evaluate(digits: str, match: re.Match[str]) -> Number:
    """The number times its factor; the number alone if the result would be too long, or a division by 0."""
    negative = match["sign"] == "-"
    plain = Decimal(f"-{digits}" if negative else digits)
    factor, power = _read_factor(match), int(match["power"] or 1)
    if factor is None or len(digits) * abs(power) > MAX_DIGITS or (power < 0 and not plain):
        return plain
    value = Fraction(digits) ** power
    if match["numerator"]:
        part = Fraction(int(match["numerator"]), int(match["mixed_denominator"]))
        value = value + part if digits.isdigit() and part < 1 else part
    return (-value if negative else value) * factor


def _read_factor(match: re.Match[str]) -> Fraction | None:
    """The factor after the number, such as 10^6, million or /4; None if there is none, or if it cannot be computed."""
    factor = Fraction(_SCALES[match["scale"]] if match["scale"] else 1)
    if _is_scale(match):
        factor = Fraction(_SUFFIXES[match["suffix"][0].lower()])
    power_of_ten = match["exponent"] or match["power_of_ten"]
    if power_of_ten:
        return factor * Fraction(10) ** int(power_of_ten)
    if match["denominator"]:
        denominator, _ = _parse_decimal(match["denominator"])
        return factor / Fraction(denominator) if len(denominator) <= MAX_DIGITS and Fraction(denominator) else None
    if match["numerator"]:
        short = max(len(match["numerator"]), len(match["mixed_denominator"])) <= MAX_DIGITS
        return factor if short and int(match["mixed_denominator"]) else None
    return factor if match["power"] or match["scale"] or match["suffix"] else None


def _is_scale(match: re.Match[str]) -> bool:
    """Whether the letter after the digits is a factor: not in a 401k, and not the kelvins of a temperature."""
    if not match["suffix"] or (match["digits"] == "401" and not match["currency"]):
        return False
    return match["suffix"] != "K" or bool(match["currency"]) or not _KELVIN.search(match.string)


_EQUIVALENTS = dict(zip("’ʼ٬，．٫＋％＄￥⁄∕／＝（）［］", "''',..+%$¥///=()[]", strict=True))


class _Characters(dict[int, str]):
    """Maps non-ASCII characters to their ASCII equivalent in numbers, or to themselves."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = character if code < 128 else self._plain(character)
        return self[code]

    def _plain(self, character: str) -> str:
        if character in "−–－﹣‐‑‒":
            return "-"
        if character in "\u2007\u2009\u200a\u202f\u2006\u2005":
            return "\u00a0"
        if unicodedata.category(character) in ("Cf", "Mn"):
            return ""
        if (digit := unicodedata.decimal(character, None)) is not None:
            return str(digit)
        if unicodedata.category(character) == "No" and "⁄" in (fraction := unicodedata.normalize("NFKC", character)):
            return "\u2064" + fraction.replace("⁄", "/")
        return _EQUIVALENTS.get(character, character)


_CHARACTERS = _Characters()


def _normalize(line: str) -> str:
    """The line with a single spelling of signs, spaces, digits, powers, fractions and groups."""
    if not line.isascii():
        line = re.sub("[₀-₉]+", " ", line)
        line = _OTHER_ROOT.sub("√ ", line)
        line = _SUPERSCRIPT.sub(lambda match: f"^({match[0].translate(_SUPERSCRIPTS)})", line)
        line = line.translate(_CHARACTERS)
        # U+2064 marks a vulgar fraction: after a digit it is the fraction of a mixed number.
        line = re.sub("([0-9]?)\u2064", lambda match: f"{match[1]} " if match[1] else "", line)
    if "<su" in line:
        line = _HTML.sub(lambda match: f"^({match[1]})" if match[1] else " ", line)
    if "_" in line:
        line = _SUBSCRIPT.sub(" ", line)
    if "\\" in line or "{" in line:
        line = _strip_latex(line)
    if "√" in line or "sqrt" in line:
        line = _ROOT.sub(lambda match: _rewrite_root(match[1]), line)
    if "~" in line:
        line = _TIE.sub(" ", line)
    line = _AFTER_EQUALS.sub("= -", line)
    return _SPACED.sub(lambda match: re.sub("[ \u00a0]", "'", match[0]), line)


def _strip_latex(line: str) -> str:
    line = line.replace("\\\\", " ; ").replace("\\!", "")
    line = _LATEX_SEPARATOR.sub(lambda match: match[1] or match[2], line)
    line = re.sub(r"\\(?:[,;: ]|thinspace(?![A-Za-z]))", "\u00a0", line)
    line = _LATEX_FRACTION.sub(_rewrite_fraction, line)
    if "sqrt" in line:
        line = _LATEX_ROOT.sub(_rewrite_latex_root, line)
        line = _ROOT_FRACTION.sub(lambda match: f" {match[1] or match[3]}/{match[2] or match[4]} ", line)
    line = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?", "°", line)
    line = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "×", line)
    line = re.sub(r"\\[A-Za-z]+\*?", " ", line)
    return re.sub(r"\\([$%#&_()\[\]])", r"\1", line.replace("\\{", "(").replace("\\}", ")"))


def _rewrite_latex_root(match: re.Match[str]) -> str:
    index, inner = (match[1] or "2").strip(), match[2] or match[3] or ""
    return _rewrite_root(inner) if index == "2" else "√ "


def _rewrite_root(inner: str) -> str:
    """A root in a single spelling, without a radicand if that is not a number."""
    number = _RADICAND.fullmatch(inner)
    if not number:
        return "√ "
    return f"√({number[1]})" if "/" in number[1] else f"√{number[1]}"


def _rewrite_fraction(match: re.Match[str]) -> str:
    whole, numerator, denominator = match[1], match[2] or match[3], match[4] or match[5]
    return f"{whole + ' ' if whole else ''}{numerator}/{denominator}"


def _find_last_box(text: str) -> str:
    """The content of the last box of a LaTeX text, or an empty string."""
    boxes = list(_BOXED.finditer(text)) if "\\" in text else []
    if not boxes:
        return ""
    depth, start = 1, boxes[-1].end()
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return text[start:]
