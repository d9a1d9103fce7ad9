"""Whether two answers differ, by the numbers they are made of (entrograd.rewards.verify.latex)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from entrograd.rewards.verify.latex import CONSTANTS, Reader, near
from entrograd.rewards.verify.tokens import UnreadableError, is_unknown, name, tokens

_LONGEST = 300  # characters


class Values(NamedTuple):
    """numbers: of an answer or of an equation's last side, in order. sides: of an equation, as
    text; none otherwise. word: it, or one of a list, is letters alone, which have the value of
    their product but may be a word."""

    numbers: tuple[complex, ...]
    sides: tuple[str, ...] = ()
    word: bool = False


def apart(one: Values, other: Values) -> bool:
    """Whether the values show that two answers differ: one has a value that the other has not, or
    an equation fails if the other holds.

    False is no verdict: (1, 2) and (2, 1) have the same values and are different answers.
    """
    if one.word and other.word:
        return False
    if one.sides and other.sides:
        return _fails(one.sides, other.sides) or _fails(other.sides, one.sides)
    return not (_within(one.numbers, other.numbers) and _within(other.numbers, one.numbers))


def _within(some: Iterable[complex], others: Iterable[complex]) -> bool:
    return all(any(near(a, b) for b in others) for a in some)


@functools.lru_cache(maxsize=8192)
def read_values(latex: str) -> Values | None:
    """The values of an answer, None if it cannot be read."""
    sides = tuple(latex.split("="))
    if len(latex) > _LONGEST or (len(sides) > 1 and "," in latex):
        return None
    try:
        for side in sides[:-1]:
            Reader(side).value()
        reader = Reader(sides[-1])
        numbers = reader.answer()
    except (UnreadableError, ArithmeticError, ValueError):
        return None
    return Values(tuple(numbers), sides if len(sides) > 1 else (), reader.word)


@functools.lru_cache(maxsize=8192)
def _fails(definition: tuple[str, ...], equation: tuple[str, ...]) -> bool:
    """Whether an equation fails for the unknown that `definition` gives, `unknown = expression`."""
    if len(definition) != 2 or len(equation) != 2:
        return False
    try:
        unknown, *others = tokens(definition[0])
        solution = Reader(definition[1])
        if others or unknown in CONSTANTS or not is_unknown(unknown):
            return False
        if name(unknown) in map(name, solution.tokens):
            return False
        at = {name(unknown): solution.value()}
        left, right = (Reader(side, at).value() for side in equation)
    except (UnreadableError, ArithmeticError, ValueError):
        return False
    return not near(left, right)
