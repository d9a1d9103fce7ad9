r"""Whether two answers are the same, as far as spelling and exact arithmetic can tell.

A canonical form settles plain numbers and words; what it leaves open is for symbolic comparison
(entrograd.verify.worker). Nothing here is evaluated: numbers are read by fullmatch, as fractions.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from entrograd.verify.extract import INTEGER, MAX_ANSWER, trim

_DIGITS = 400  # a number of more digits is left to the symbolic comparison and its limits
# Symbolic comparison rounds decimals at the sixth place. What lies further apart than that, or than
# this share of the accepted number, is settled here: 1.4e-10 is not 2e-10.
_NEAR = Fraction(1, 100_000)

_SPELLINGS = str.maketrans(
    {"−": "-", "\u2013": "-", "\u200b": "", "\u200c": "", "\u200d": "", "\ufeff": "", "~": " "}
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\\$|\$", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle|bigl?|bigr)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;:!]", ""),
        (r"(?<!\\)\\ |\\quad(?![A-Za-z])", " "),
        (r"\{,\}", ","),
        (r"\\%", "%"),
        (r"\^\s?\{\s?\\circ\s?\}|\^\s?\\circ(?![A-Za-z])|\\degree(?![A-Za-z])|°", ""),
        (r"\s+", " "),
    ]
]
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|textit|mathbf|mbox|operatorname)\s?\{([^{}]*)\}")
_TRAILING_UNIT = re.compile(
    r"(?<=[0-9}\]) ])\\(?:text|mathrm|mbox)\s?\{[^{}]*\}(?:\^\{?-?[0-9]\}?)?$"
)
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:\\frac ?\{{(?P<p>-?[0-9]+)\}} ?\{{(?P<q>-?[0-9]+)\}}"
    rf"|\\frac ?(?P<p1>[0-9]) ?(?P<q1>[0-9])|(?P<a>[0-9]+) ?/ ?(?P<b>[0-9]+)"
    rf"|(?P<whole>{INTEGER})?(?P<decimals>\.[0-9]*)?"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,3})"
    r"| ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{ ?(?P<e1>-?[0-9]{1,3}) ?\}|(?P<e2>[0-9])))?)"
    r"(?P<percent> ?%| percent)?(?P<unit> [A-Za-z]{2,}(?: [A-Za-z]+)*)?"
)
_NO_UNITS = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "pi", "or", "and"}
_ASSIGNMENT = re.compile(r"([A-Za-z]) ?= ?([^=<>]+)")
_PLAIN_SIDE = re.compile(r"[A-Za-z0-9+\-*/^(){}., ]+")
_CHOICE = re.compile(r"\(([A-Z])\)")
_WORD = re.compile(r"(?:[A-Za-z]{3,}|[Nn]o)(?:[ '-][A-Za-z]+)*")


@dataclass(frozen=True)
class Canonical:
    """An answer in canonical spelling.

    key: the identity of a cluster, without a number's unit and an unknown's name.
    latex: what symbolic comparison is given.
    number: the exact value of a plain number (in percent, where `percent`), apart from `unit`.
    symbol: `x` in "x = 5". word: whether it is one or more plain words.
    """

    key: str
    latex: str
    number: Fraction | None = None
    percent: bool = False
    unit: str = ""
    symbol: str = ""
    word: bool = False


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> Canonical:
    """The canonical form of an answer (LaTeX, plain number or words)."""
    if len(text) > MAX_ANSWER:
        return Canonical(text, text)
    latex = _respell(text)
    spelled = " ".join(_TEXT.sub(r" \1 ", latex).split())
    latex = _TRAILING_UNIT.sub("", latex).strip() or latex
    symbol = ""
    if assignment := _ASSIGNMENT.fullmatch(spelled):
        symbol = assignment.group(1)
    value = _read_number(assignment.group(2) if assignment else spelled)
    if value is not None:
        number, percent, unit = value
        key = f"{number}{'%' if percent else ''}"
        return Canonical(key, latex, number, percent, unit, symbol)
    if choice := _CHOICE.fullmatch(spelled):
        spelled = choice.group(1)
    if _WORD.fullmatch(spelled):
        return Canonical(spelled.casefold(), latex, word=True)
    # A space matters only between two letters or digits: "1 2" is not "12".
    key = re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", spelled)
    return Canonical(key, latex, symbol=symbol)


def settle(gold: Canonical, answer: Canonical) -> bool | None:
    """Whether `answer` is `gold`; None where only symbolic comparison can tell.

    Units are compared where both answers have one. Decimals that differ by less than rounding, a
    percentage beside a plain number, and everything that is not a number or a word stay open.
    """
    if gold.symbol and answer.symbol and gold.symbol != answer.symbol:
        return None if gold.number is None or answer.number is None else False
    value = answer
    if gold.number is not None and answer.number is None:
        value = _right_side(answer)
    if gold.number is not None and value.number is not None:
        if gold.unit and value.unit and gold.unit != value.unit:
            return False
        if gold.percent != value.percent:
            return None
        if gold.number == value.number:
            return True
        whole = gold.number.denominator == value.number.denominator == 1
        apart = abs(gold.number - value.number) > _NEAR * min(Fraction(1), abs(gold.number))
        return False if whole or apart else None
    if gold.key == answer.key:
        return bool(gold.key)
    if (gold.word or gold.number is not None) and (answer.word or answer.number is not None):
        return False
    return None


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


def _read_number(text: str) -> tuple[Fraction, bool, str] | None:
    """(value, is a percentage, unit) of a plain number, else None."""
    match = _NUMBER.fullmatch(text)
    if match is None or sum(character.isdigit() for character in text) > _DIGITS:
        return None
    part = match.groupdict()
    unit = _singular(part["unit"] or "")
    if unit.split(" ")[0] in _NO_UNITS:
        return None
    top, bottom = part["p"] or part["p1"] or part["a"], part["q"] or part["q1"] or part["b"]
    if top is not None:
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom))
    else:
        digits = (part["whole"] or "").replace(",", "") + (part["decimals"] or "")
        if not any(character.isdigit() for character in digits):
            return None
        value = Fraction(f"{digits}e{part['e'] or part['e1'] or part['e2'] or 0}")
    return -value if part["sign"] == "-" else value, part["percent"] is not None, unit


def _singular(unit: str) -> str:
    return " ".join(word.removesuffix("s") or word for word in unit.casefold().split())


def _right_side(answer: Canonical) -> Canonical:
    """What stands right of the last sign of equality: 12 in "7 + 5 = 12"."""
    chain = answer.latex.split("=")
    if len(chain) > 1 and all(_PLAIN_SIDE.fullmatch(side) for side in chain):
        return canonical(chain[-1])
    return answer
