"""Plain numbers, read exactly: integers, fractions, mixed numbers, decimals (repeating ones too),
powers of ten, number words such as "million", and what follows them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from entrograd.rewards.verify.extract import INTEGER
from entrograd.rewards.verify.units import Unit, parse_unit

_DIGITS = 400  # a number of more digits is left to the symbolic comparison and its limits
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:(?P<units>[0-9]+ ?)?\\frac ?\{{(?P<p>-?[0-9]+)\}} ?\{{(?P<q>-?[0-9]+)\}}"
    rf"|(?P<units1>[0-9]+ )?\\frac ?(?P<p1>[0-9]) ?(?P<q1>[0-9])"
    rf"|(?P<units2>[0-9]+ )?(?P<a>[0-9]+) ?/ ?(?P<b>[0-9]+)"
    rf"|(?P<grouped>[0-9]{{1,3}}(?: [0-9]{{3}})+)"
    rf"|(?P<whole>{INTEGER})?(?P<decimals>\.[0-9]*)?(?:\\overline ?\{{(?P<repeated>[0-9]+)\}})?"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,3})"
    r"| ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{ ?(?P<e1>-?[0-9]{1,3}) ?\}|(?P<e2>[0-9])))?)"
    r"(?:_ ?\{? ?(?P<base>[0-9]{1,2}) ?\}?)?"
    r"(?P<percent> ?%| percent)?(?P<rest> ?[A-Za-z].*)?"
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LABEL = re.compile(r" [A-Za-z]{3,}(?: [A-Za-z]+)*")
# Words that, after a number, do not name what is counted.
_NO_LABELS = {
    *("pi", "or", "and", "to", "plus", "minus", "times", "over", "by", "mod", "modulo", "squared"),
    *("cubed", "factorial", "dozen", "if", "is", "not", "less", "more", "than", "half", "halves"),
    *("third", "thirds", "fourth", "fourths", "quarter", "quarters", "fifth", "fifths", "tenth"),
    *("tenths", "hundredths", "thousandths"),
}


class Number(NamedTuple):
    """The exact value (in percent if `percent`). unit: of measure, or as a string what is
    counted or a base. doubtful: the unit is one letter that may be an unknown."""

    value: Fraction
    percent: bool
    unit: Unit | str | None
    doubtful: bool


def read_number(text: str) -> Number | None:
    """A plain number, else None."""
    match = _NUMBER.fullmatch(text)
    if match is None or sum(character.isdigit() for character in text) > _DIGITS:
        return None
    part = match.groupdict()
    following = _following(part["rest"] or "")
    value = _value(part)
    if value is None or following is None or (part["base"] and (part["decimals"] or part["rest"])):
        return None
    power, unit, doubtful = following
    if part["base"]:
        unit = f"base {part['base']}"
    value = (-value if part["sign"] == "-" else value) * 10**power
    return Number(value, part["percent"] is not None, unit, doubtful)


def _value(part: Mapping[str, str | None]) -> Fraction | None:
    """The value without its sign, from the groups of _NUMBER."""
    top, bottom = part["p"] or part["p1"] or part["a"], part["q"] or part["q1"] or part["b"]
    if top is not None and bottom is not None:
        if int(bottom) == 0:
            return None
        units = part["units"] or part["units1"] or part["units2"]
        value = Fraction(int(top), int(bottom))
        if units and not 0 < value < 1:  # 1 3/2 is no mixed number
            return None
        return int(units or 0) + value
    if part["grouped"]:
        return Fraction(part["grouped"].replace(" ", ""))
    decimals, repeated = part["decimals"] or "", part["repeated"] or ""
    digits = (part["whole"] or "").replace(",", "") + decimals
    if not any(character.isdigit() for character in digits) or (repeated and not decimals):
        return None
    value = Fraction(f"{digits}e0")
    if repeated:
        value += Fraction(int(repeated), 10 ** (len(decimals) - 1) * (10 ** len(repeated) - 1))
    return value * Fraction(10) ** int(part["e"] or part["e1"] or part["e2"] or 0)


def _following(rest: str) -> tuple[int, Unit | str | None, bool] | None:
    """What follows a number: (power of ten, unit, whether that is doubtful), or None."""
    power = 0
    first, _, others = rest.strip().partition(" ")
    if rest.startswith(" ") and first in _MAGNITUDES:
        power, rest = _MAGNITUDES[first], f" {others}" if others else ""
    if not rest:
        return power, None, False
    unit = parse_unit(rest)
    letter = len(rest.strip()) == 1
    if unit is not None and (rest.startswith(" ") or not letter):
        return power, unit, letter
    counted = label(rest)
    return None if counted is None else (power, counted, False)


def label(text: str) -> str | None:
    """What is counted, in lower case and the singular: "apple"."""
    words = text.casefold().split()
    if not _LABEL.fullmatch(text) or _NO_LABELS & set(words) or words[0] in _MAGNITUDES:
        return None
    return " ".join(word.removesuffix("s") or word for word in words)
