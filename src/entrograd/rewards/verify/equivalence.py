r"""Whether two answers are the same, as far as spelling and exact arithmetic can tell.

A canonical form settles plain numbers and words, values at a point settle most expressions that
differ (values.py); what is left open is for symbolic comparison (worker.py). Nothing here is
evaluated: numbers are read by fullmatch, as fractions.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from entrograd.rewards.verify.extract import MAX_ANSWER, trim
from entrograd.rewards.verify.numbers import label, read_number
from entrograd.rewards.verify.units import Unit, parse_unit
from entrograd.rewards.verify.values import Values, apart, read_values

# Symbolic comparison rounds decimals at the sixth place. What lies further apart than that, or than
# this fraction of the accepted number, is settled here: 1.4e-10 is not 2e-10.
_NEAR = Fraction(1, 100_000)
_ONE = Fraction(1)

_SPELLINGS = str.maketrans(
    {"−": "-", "\u2013": "-", "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "~": " "}
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_DEGREES = r"(?:\^\s?\{\s?\\circ\s?\}|\^\s?\\circ(?![A-Za-z])|°)"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^(-?) ?\\\$ ?(-?[0-9.,]+)$", r"\1\2 dollars"),
        (r"\\\$|\$", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle|bigl?|bigr)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;:!]", ""),
        (r"(?<!\\)\\ |\\quad(?![A-Za-z])", " "),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"(\\\\)\s?\[[0-9.]+ ?[a-z]{2}\]", r"\1"),
        (rf"{_DEGREES} ?(?:\\(?:text|mathrm)\{{)? ?C\b ?\}}?$", r" \\text{celsius}"),
        (rf"{_DEGREES} ?(?:\\(?:text|mathrm)\{{)? ?F\b ?\}}?$", r" \\text{fahrenheit}"),
        (rf"{_DEGREES}|\\degree(?![A-Za-z])", ""),
        (r"\s+", " "),
    ]
]
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|textit|mathbf|mbox|operatorname)\s?\{([^{}]*)\}")
_UNIT_COMMAND = r"\\(?:text|mathrm|mbox)\s?\{[^{}]*\}"
_TRAILING_UNIT = re.compile(
    rf"(?<=[0-9}}\]) a-z]){_UNIT_COMMAND}"
    rf"(?:{_UNIT_COMMAND}|\\cdot|[/ ]|\^ ?\{{? ?-?[0-9] ?\}}?)*$"
)
_LISTED_TEXT = re.compile(r"[^A-Za-z]*(?:\b(?:and|or)\b[^A-Za-z]*)+")
_ASSIGNMENT = re.compile(r"([A-Za-z]) ?= ?([^=<>]+)")
_PLAIN_SIDE = re.compile(r"[A-Za-z0-9+\-*/^(){}., ]+")
_EQUATION = re.compile(r".*[A-Za-z].*[-+].*= ?0")
_OPENING, _CLOSING = ("(", "[", r"\{"), (")", "]", r"\}")
_MARKS = re.compile(r"[()\[\]{}]|(?<![0-9]),|,(?![0-9]{3}(?![0-9]))")
_FUNCTIONS = set(
    re.findall("[a-z]+", "frac sqrt cdot times sin cos tan cot sec csc log ln exp pi theta alpha")
)
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_LONE_BRACES = re.compile(r"(?<=[\^_]) ?\{ ?([A-Za-z0-9]) ?\}(?![A-Za-z0-9])")
# Not e, i and d; nor C and P, which count combinations, and E, the power of ten.
_UNKNOWN = re.compile(r"(?<![A-Za-z])[abcf-hj-zABDF-OQ-Z](?![A-Za-z])")
_BARE_CHOICE = re.compile(r"\(?([A-Z])\)?")
_CHOICE = re.compile(
    r"\((?P<a>[A-J])\) ?\S.*|(?P<b>[A-J])[).:] ?\S.*|(?i:option|choice|answer) \(?(?P<c>[A-J])\)?"
)
_CLOCK = re.compile(r"([0-9]{1,2}:[0-9]{2}) ?([APap])\.? ?[Mm]\.?")
_WORD = re.compile(r"(?:(?:[Aa]n?|[Tt]he) )?((?:[A-Za-z]{3,}|[Nn]o)(?:[ '-][A-Za-z]+)*)")


@dataclass(frozen=True)
class Canonical:
    """An answer in canonical spelling.

    key: the identity of a cluster, without a number's unit and an unknown's name.
    latex: what symbolic comparison is given.
    number: the exact value of a plain number (in percent if `percent`), without its `unit`.
    unit: of measure, or as a string what is counted ("apple"), am or pm of a clock, or a number's
    base. doubtful: the unit is one letter that may be an unknown ("5 m").
    symbol: `x` in "x = 5". word: whether it is one or more plain words.
    choice: C in "C", "(C) 12" and "option C". several: whether commas divide it.
    unknowns: whether it is an expression of unknowns, or an equation that ends in one.
    """

    key: str
    latex: str
    number: Fraction | None = None
    percent: bool = False
    unit: Unit | str | None = None
    doubtful: bool = False
    symbol: str = ""
    word: bool = False
    choice: str = ""
    several: bool = False
    unknowns: bool = False


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> Canonical:
    """The canonical form of an answer (LaTeX, plain number or words)."""
    if len(text) > MAX_ANSWER:
        return Canonical(text, text)
    latex = _respell(text)
    if (wrapped := _TEXT.fullmatch(latex)) and _LISTED_TEXT.fullmatch(wrapped.group(1)):
        latex = wrapped.group(1)
    whole = _unwrapped(latex)
    unit: Unit | str | None = None
    tail = _TRAILING_UNIT.search(latex)
    if tail and (bare := latex[: tail.start()].strip()):
        latex, ending = bare, _unwrapped(tail.group())
        unit = parse_unit(ending) or (label(f" {ending}") if ending else None)
    spelled = _unwrapped(latex) if unit else whole
    symbol = ""
    if assignment := _ASSIGNMENT.fullmatch(spelled):
        symbol = assignment.group(1)
    number = read_number(assignment.group(2) if assignment else spelled)
    if number is not None:
        value, percent, own_unit, doubtful = number
        key = f"{value}{'%' if percent else ''}"
        return Canonical(key, latex, value, percent, unit or own_unit, doubtful, symbol)
    if clock := _CLOCK.fullmatch(spelled):
        return Canonical(clock.group(1), clock.group(1), unit=clock.group(2).lower())
    if choice := _BARE_CHOICE.fullmatch(spelled):
        return Canonical(choice.group(1), latex, choice=choice.group(1))
    if choice := _CHOICE.fullmatch(whole):
        return Canonical(_key(whole), latex, choice=next(filter(None, choice.groups())))
    if word := _WORD.fullmatch(whole):
        return Canonical(word.group(1).casefold().replace("-", " "), latex, word=True)
    key = _key(spelled)
    several, unknowns = _has_commas(key), _has_unknowns(latex)
    return Canonical(
        key, latex, unit=unit, symbol=symbol, several=several, unknowns=unknowns and not several
    )


def settle(gold: Canonical, answer: Canonical) -> bool | None:
    """Whether `answer` is `gold`; None if only symbolic comparison can tell.

    Units are compared if both answers have one. Left open are decimals that differ by less than
    rounding, a percentage and a plain number, and anything that is neither number nor word, unless
    the values of the two show that they differ.
    """
    if gold.symbol and answer.symbol and gold.symbol != answer.symbol:
        both = gold.number is not None and answer.number is not None
        return False if both else _by_values(gold, answer)
    if gold.choice and answer.choice and {gold.choice, answer.choice} & {gold.key, answer.key}:
        return gold.choice == answer.choice
    value = answer
    if gold.number is not None and answer.number is None:
        if answer.several or _is_zero_equation(gold, answer):
            return False
        value = _right_side(answer)
    scale = _scale(gold, value)
    if gold.number is not None and value.number is not None:
        if scale is None or gold.percent != value.percent:
            return False if scale == 0 else None
        scaled = value.number if scale == 1 else value.number * scale
        return scale != 0 and _same_number(gold.number, scaled)
    if scale == 0 or (scale not in (None, 1)) or _set_beside_tuple(gold.key, answer.key):
        return False
    if gold.key == answer.key:
        return bool(gold.key)
    for number, other in ((gold, answer), (answer, gold)):
        if number.number is not None and (other.several or other.unknowns):
            return False
    if (gold.word or gold.number is not None) and (answer.word or answer.number is not None):
        return False
    return _by_values(gold, answer) if scale else None


def _by_values(gold: Canonical, answer: Canonical) -> bool | None:
    """False if their values show that they differ, else None."""
    one, other = _values(gold), _values(answer)
    return False if one and other and apart(one, other) else None


def _values(answer: Canonical) -> Values | None:
    if answer.number is None or answer.symbol:
        return read_values(answer.latex)
    if answer.percent or (isinstance(answer.unit, str) and answer.unit.startswith("base")):
        return None
    try:
        return Values((complex(answer.number),))
    except OverflowError:
        return None


def _same_number(gold: Fraction, answer: Fraction) -> bool | None:
    if gold == answer:
        return True
    if gold.denominator == answer.denominator == 1:
        return False
    return False if abs(gold - answer) > _NEAR * min(Fraction(1), abs(gold)) else None


def _scale(gold: Canonical, answer: Canonical) -> Fraction | None:
    """The factor from the answer's unit to the accepted one: 1/100 from cm to m, 0 between units
    of different quantities, 1 if one has no unit; None if it is unclear whether one has."""
    one, other = gold.unit, answer.unit
    if one is None or other is None:
        return None if gold.doubtful or answer.doubtful else _ONE
    if isinstance(one, Unit) and isinstance(other, Unit):
        same = one.dimension == other.dimension
        return other.factor / one.factor if same else Fraction(0)
    if isinstance(one, str) and isinstance(other, str):
        return Fraction(one.split(" ")[-1] == other.split(" ")[-1])
    return Fraction(0)


def _is_zero_equation(gold: Canonical, answer: Canonical) -> bool:
    """Whether the answer is an equation that ends in "= 0", which is not the number 0."""
    return gold.number == 0 and _EQUATION.fullmatch(answer.latex) is not None


def _has_unknowns(latex: str) -> bool:
    """Whether an expression, or an equation's last side, is one of unknowns: no number then."""
    side = latex.rpartition("=")[2]
    if any(mark in latex for mark in "<>≤≥") or not _FUNCTIONS.issuperset(_COMMAND.findall(side)):
        return False
    return _UNKNOWN.search(_COMMAND.sub(" ", side)) is not None


def _has_commas(key: str) -> bool:
    """Whether commas divide the key, or what its outermost brackets hold; commas of thousands do
    not count."""
    if key[:2] in _OPENING and key[-2:] in _CLOSING:
        key = key[2:-2]
    elif key[:1] in _OPENING and key[-1:] in _CLOSING:
        key = key[1:-1]
    depth = 0
    for mark in _MARKS.finditer(key):
        character = mark.group()
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            return True
    return False


def _set_beside_tuple(gold: str, answer: str) -> bool:
    r"""Whether one key is \{a,b\} and the other (a,b): a set has no order."""
    pair = {gold[:2] + gold[-2:], answer[:2] + answer[-2:]}
    if r"\{\}" not in pair or not all("," in key for key in (gold, answer)):
        return False
    return any(key[:1] == "(" and key[-1:] == ")" for key in (gold, answer))


def _unwrapped(latex: str) -> str:
    """Without commands for text, with single spaces."""
    return " ".join(_TEXT.sub(r" \1 ", latex).split())


def _key(spelled: str) -> str:
    """A space matters only between two letters or digits: "1 2" is not "12". x^{2} is x^2."""
    spelled = _LONE_BRACES.sub(r"\1", spelled)
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", spelled)


def _respell(text: str) -> str:
    text = trim(text.translate(_SPELLINGS)).rstrip(" .,;").strip()
    for opening, closing in _DELIMITERS:
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inner:
            text = inner
            break
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return trim(text).rstrip(" .,;").strip()


def _right_side(answer: Canonical) -> Canonical:
    """The right side of the last equals sign: 12 in "7 + 5 = 12"."""
    chain = answer.latex.split("=")
    if len(chain) > 1 and all(_PLAIN_SIDE.fullmatch(side) for side in chain):
        return canonical(chain[-1])
    return answer
