r"""The numbers that a text of LaTeX is made of, if it can be read in one way only.

Each unknown stands for a number made from its name, so that expressions of unknowns have values
too. f(x) is read as f times x: what is equal for every f is equal for this one. Only a small part
of LaTeX is read: sums, products, quotients, powers, roots and a few functions of numbers, unknowns
and constants; and lists, tuples, sets, intervals and matrices of these. Notation with two meanings
is not read, nor are sums that lose their digits in floating point. Time is linear in the text.
"""

from __future__ import annotations

import cmath
import math
import re
import zlib
from collections.abc import Callable, Mapping

from entrograd.rewards.verify.tokens import (
    TIMES,
    UnreadableError,
    begins_factor,
    is_number,
    is_unknown,
    name,
    tokens,
)

_NEAR = 1e-5  # of the larger: as far as decimals may be rounded (equivalence.py)
_DEEPEST = 12  # nested groups
_LARGEST_EXPONENT, _LARGEST_ANGLE, _LARGEST_FACTORIAL = 1e4, 1e4, 170
_BLURRED = 1e-8  # a sum this small beside its terms has lost its digits; as have sin(pi) and ln(1)

# i, too: what is equal for a number of any name is equal for this one.
CONSTANTS = {"\\pi": complex(math.pi), "e": complex(math.e), "i": 1j}
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "arctan": cmath.atan,
}
_ROUNDED = {"\\lfloor": ("\\rfloor", math.floor), "\\lceil": ("\\rceil", math.ceil)}
_OPENING, _CLOSING = ("(", "[", "\\{"), (")", "]", "\\}")
_AMBIGUOUS_COMMA = re.compile(r"[0-9]\s?,\s?[0-9]{3}(?![0-9])")  # of thousands or of a list
_MATRIX = re.compile(r"\s*\\begin ?\{([pb]matrix)\}(.*)\\end ?\{\1\}\s*")


def near(one: complex, other: complex) -> bool:
    """Whether two values may differ by rounding alone."""
    return abs(one - other) <= _NEAR * max(abs(one), abs(other))


def point(name: str) -> float:
    """The number, between 1 and 2, that stands for the unknown of this name (in lower case)."""
    return 1 + zlib.crc32(name.encode("utf-8", "replace")) / 2**32


class Reader:
    """Recursive descent over the tokens of a text; each method reads on from `place`."""

    def __init__(self, text: str, at: Mapping[str, complex] | None = None) -> None:
        if matrix := _MATRIX.fullmatch(text):
            text = matrix.group(2).replace("\\\\", ",").replace("&", ",")
        elif _AMBIGUOUS_COMMA.search(text):
            raise UnreadableError
        self.tokens = [*tokens(text), ""]
        self.lists = _lists(self.tokens)
        self.place = self.depth = 0
        self.signs = {"+": 1, "-": -1}
        self.word = False
        self.at = at or {}

    def answer(self) -> list[complex]:
        """The values of the whole text."""
        values = self.entries()
        if self.next:
            raise UnreadableError
        return values

    def value(self) -> complex:
        """The value of the whole text, which is one expression."""
        value = self.sum()
        if self.next:
            raise UnreadableError
        return value

    @property
    def next(self) -> str:
        """The token at `place`, "" at the end."""
        return self.tokens[self.place]

    def take(self, *allowed: str) -> str:
        token = self.next
        if not token or (allowed and token not in allowed):
            raise UnreadableError
        self.place += 1
        return token

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise UnreadableError

    def entries(self) -> list[complex]:
        """Expressions with commas between them, or brackets around such."""
        self.deeper()
        values = self.entry()
        while self.next == ",":
            self.take()
            values += self.entry()
        self.depth -= 1
        return values

    def entry(self) -> list[complex]:
        start = self.place
        if start in self.lists:
            self.take()
            values = self.entries()
            self.take(*_CLOSING)
        else:
            values = self.both_signs()
            letters = (t in "()" or is_unknown(t) for t in self.tokens[start : self.place])
            self.word = self.word or all(letters)
        if self.next not in ("", ",", *_CLOSING):
            raise UnreadableError
        return values

    def both_signs(self) -> list[complex]:
        r"""The value of an expression, both values if there is a \pm in it."""
        start, values = self.place, []
        for sign in (1, -1):
            self.place, self.signs["\\pm"] = start, sign
            values.append(self.sum())
            if "\\pm" not in self.tokens[start : self.place]:
                break
        del self.signs["\\pm"]
        if self.tokens[start : self.place].count("\\pm") > 1:
            raise UnreadableError
        return values

    def sum(self) -> complex:
        self.deeper()
        total, size = 0j, 0.0
        while True:
            sign = self.signs[self.take()] if self.next in self.signs else 1
            term = self.product()
            total, size = total + sign * term, size + abs(term)
            if self.next not in self.signs:
                break
        self.depth -= 1
        if abs(total) < _BLURRED * size:
            raise UnreadableError
        return total

    def product(self) -> complex:
        value, divided = self.factor(), False
        while self.next in TIMES or self.next == "/" or begins_factor(self.next):
            sign = self.take() if not begins_factor(self.next) else ""
            if divided and not sign:  # 1/2x
                raise UnreadableError
            divided = divided or sign == "/"
            value = value / self.factor() if sign == "/" else value * self.factor()
        return value

    def factor(self) -> complex:
        """What stands between signs, and its exponent."""
        token = self.take()
        if is_number(token):
            value = complex(float(token))
            if self.next == "!":
                self.take()
                value = _factorial(value.real)
            if self.next in ("\\frac", "!"):  # 1 1/2, 3!!
                raise UnreadableError
        elif token == "(":
            value = self.sum()
            self.take(")")
        elif token == "\\frac":
            value = self.argument() / self.argument()
        elif token == "\\sqrt":
            value = self.root()
        elif token in _ROUNDED:
            value = self.rounded(token)
        elif token in ("\\ln", "\\log") or token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        else:
            value = self.symbol(token)
        if self.next == "^":
            self.take()
            value = _power(value, self.argument())
        if self.next == "^" or is_number(self.next):  # 2 3
            raise UnreadableError
        return value

    def group(self) -> complex:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def argument(self) -> complex:
        """A group, or one digit or letter: x^10 may be x^{10} or x^1 0."""
        if self.next == "{":
            return self.group()
        token = self.take()
        if is_number(token):
            if len(token) > 1:
                raise UnreadableError
            return complex(float(token))
        return self.symbol(token)

    def root(self) -> complex:
        degree = 2 + 0j
        if self.next == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        return _power(self.argument(), 1 / degree)

    def rounded(self, opening: str) -> complex:
        """The integer below or above a real number that is not close to one."""
        value, (closing, rounding) = self.sum(), _ROUNDED[opening]
        self.take(closing)
        if value.imag or abs(value.real) > 1 / _BLURRED or near(value, round(value.real)):
            raise UnreadableError
        return complex(rounding(value.real))

    def function(self, called: str) -> complex:
        """A function, its power and its argument: in brackets, or one number or symbol."""
        base, power = 1 + 0j, 1 + 0j
        if called == "log":  # without a base it may be 10 or e
            self.take("_")
            base = _log(self.argument())
        elif self.next == "^":
            self.take()
            power = self.argument()
            if power not in (2, 3):  # -1 may be the inverse
                raise UnreadableError
        token = self.next
        if token == "(":
            self.take()
            argument = self.sum()
            self.take(")")
        elif is_number(token):
            argument = complex(float(self.take()))
        else:
            argument = self.argument()
        if self.next not in ("", "+", "-", ",", "}", *_CLOSING):  # sin x y
            raise UnreadableError
        if abs(argument) > _LARGEST_ANGLE:
            raise UnreadableError
        value = _FUNCTIONS[called](argument) if called in _FUNCTIONS else _log(argument) / base
        if not _BLURRED < abs(value) < 1 / _BLURRED:
            raise UnreadableError
        return _power(value, power)

    def symbol(self, token: str) -> complex:
        """A constant or an unknown."""
        if token in CONSTANTS:
            return CONSTANTS[token]
        if not is_unknown(token) or (token == "d" and is_unknown(self.next)):  # dx
            raise UnreadableError
        return self.at.get(name(token), complex(point(name(token))))


def _lists(tokens: list[str]) -> set[int]:
    """Where the brackets of a list open: they hold a comma, or are not round."""
    starts, opened = set(), []
    for place, token in enumerate(tokens):
        if token in _OPENING:
            opened.append(place)
            if token != "(":
                starts.add(place)
        elif token in _CLOSING and opened:
            opened.pop()
        elif token == "," and opened:
            starts.add(opened[-1])
    return starts


def _power(base: complex, exponent: complex) -> complex:
    if abs(exponent) > _LARGEST_EXPONENT:
        raise UnreadableError
    return _off_cut(base) ** exponent


def _factorial(number: float) -> complex:
    if number > _LARGEST_FACTORIAL or number != int(number):
        raise UnreadableError
    return complex(math.factorial(int(number)))


def _log(value: complex) -> complex:
    return cmath.log(_off_cut(value))


def _off_cut(value: complex) -> complex:
    """`value`; a negative real number lies above the branch cut, whatever the sign of its zero."""
    if value.real < 0 and 0 < abs(value.imag) < _BLURRED * -value.real:
        raise UnreadableError
    return complex(value.real, value.imag + 0.0)
