"""Units of measure: names and compounds such as "km/h", "square feet" or "kg m/s^2", as a dimension
and a factor. Exact fractions; a name that is not in the table is no unit."""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """dimension: (base unit, power) pairs, sorted. factor: this unit in base units."""

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction


# name and aliases -> its value in base units. What converts by more than a factor (temperatures)
# is a base unit of its own.
_NAMES = {
    "m meter metre": "1 meter",
    "cm centimeter centimetre": "1/100 meter",
    "mm millimeter millimetre": "1/1000 meter",
    "km kilometer kilometre": "1000 meter",
    "nm nanometer nanometre": "1/1000000000 meter",
    "in inch inche": "127/5000 meter",
    "ft foot feet": "381/1250 meter",
    "yd yard": "1143/1250 meter",
    "mi mile": "201168/125 meter",
    "s sec second": "1 second",
    "ms millisecond": "1/1000 second",
    "min minute": "60 second",
    "h hr hour": "3600 second",
    "day": "86400 second",
    "week": "604800 second",
    "month": "1 month",
    "yr year": "12 month",
    "g gram gm": "1 gram",
    "mg milligram": "1/1000 gram",
    "kg kilogram kilo": "1000 gram",
    "lb pound": "45359237/100000 gram",
    "oz ounce": "45359237/1600000 gram",
    "ton tonne": "1 ton",
    "l liter litre": "1/1000 meter^3",
    "ml milliliter millilitre": "1/1000000 meter^3",
    "gal gallon": "1 gallon",
    "qt quart": "1/4 gallon",
    "pint": "1/8 gallon",
    "cup": "1/16 gallon",
    "dollar usd buck": "1 dollar",
    "cent": "1/100 dollar",
    "euro": "1 euro",
    "rupee": "1 rupee",
    "degree deg": "1 degree",
    "rad radian": "1 radian",
    "celsiu": "1 celsiu",
    "fahrenheit": "1 fahrenheit",
    "kelvin": "1 kelvin",
    "n newton": "1000 gram meter/second^2",
    "j joule": "1000 gram meter^2/second^2",
    "w watt": "1000 gram meter^2/second^3",
    "pa pascal": "1000 gram/meter second^2",
    "hz hertz": "1 /second",
    "mph": "1397/3125 meter/second",
    "kph kmph": "5/18 meter/second",
    "mol mole": "1 mole",
    "ev": "1 electronvolt",
    "v volt": "1 volt",
    "amp ampere": "1 ampere",
    "ohm": "1 ohm",
}
_WORD = re.compile(r"([a-z]+)(?:\^([1-9]))?")
_SPLIT = re.compile(r"(/)|[\s*]+")
_AHEAD = {"square": 2, "sq": 2, "cubic": 3}
_BEHIND = {"squared": 2, "cubed": 3}
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:cdot|times|,)|·|[{}~.]", " "),
        ("²", "^2"),
        ("³", "^3"),
        (r"\bdegrees? (?=celsius|fahrenheit)", ""),
        (r"\bmiles? per hour\b", "mph"),
        (r"\bper\b", "/"),
        (r"\s*\^\s*", "^"),
        (r"\s*/\s*", "/"),
    ]
]


@functools.lru_cache(maxsize=1024)
def parse_unit(text: str) -> Unit | None:
    """The unit that a text names, or None; a text of more than 40 characters names none."""
    text = text.strip().lower()
    if not text or len(text) > 40:
        return None
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _compound(text.strip(), _TABLE)


def _compound(text: str, table: dict[str, Unit]) -> Unit | None:
    """Factors separated by spaces or a slash; all that follows a slash divides."""
    powers: dict[str, int] = {}
    factor = Fraction(1)
    sign, ahead, last = 1, 1, None
    for part in filter(None, _SPLIT.split(text)):
        if part == "/":
            sign = -1
            continue
        if part in _AHEAD:
            ahead = _AHEAD[part]
            continue
        if part in _BEHIND and last is not None:
            unit, power = last, sign * (_BEHIND[part] - 1)
        else:
            word = _WORD.fullmatch(part)
            found = word and (table.get(word[1]) or table.get(word[1].removesuffix("s")))
            if not word or not found:
                return None
            unit, power = found, sign * ahead * int(word[2] or 1)
            last, ahead = unit, 1
        factor *= unit.factor**power
        for name, exponent in unit.dimension:
            powers[name] = powers.get(name, 0) + exponent * power
    dimension = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(dimension, factor) if dimension else None


def _build() -> dict[str, Unit]:
    """The units by name. Definitions are in base units, which stand for themselves."""
    words = {word for text in _NAMES.values() for word in re.findall("[a-z]+", text)}
    bases = {word: Unit(((word, 1),), Fraction(1)) for word in words}
    table: dict[str, Unit] = {}
    for aliases, text in _NAMES.items():
        value, _, compound = text.partition(" ")
        unit = _compound(compound, bases)
        assert unit is not None, text
        unit = unit._replace(factor=Fraction(value))
        table |= dict.fromkeys(aliases.split(), unit)
    return table


_TABLE = _build()
