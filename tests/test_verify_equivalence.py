"""The canonical form: what it settles and what it must leave open."""

from __future__ import annotations

from fractions import Fraction

import pytest

from entrograd.rewards.verify.equivalence import canonical, settle


def settled(gold: str, answer: str) -> bool | None:
    return settle(canonical(gold), canonical(answer))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("142.0", "142"),
        ("50,625", "50625"),
        ("10{,}000", "$10000$"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{2}{4}", "1/2"),
        (r"\frac12", "\\(\\tfrac{1}{2}\\)"),
        ("-4.0", "−4"),
        ("033", "33"),
        ("5", r"5 \text{ cm}"),
        ("15", "15 dollars."),
        ("90", r"90^{\circ}"),
        (r"50\%", "50 %"),
        ("3.3e-10", r"3.3 \times 10^{-10}"),
        ("5", "x = 5"),
        ("x=5", "5"),
        ("12", "7 + 5 = 12"),
        ("5", "a + b = 5"),
        ("A", "(A)"),
        (r"\text{even}", "Even"),
        ("x + 1", "$x+1$."),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (".35625", "0.35625"),
    ],
)
def test_equal(gold: str, answer: str) -> None:
    assert settled(gold, answer) is True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "21"),
        ("1/3", "0.3333"),
        ("4.0", "4.1"),
        ("1.4e-10", "2e-10"),
        ("5 cm", "5 km"),
        ("x = 5", "y = 5"),
        ("even", "odd"),
        ("5", "five"),
        ("yes", "No"),
        ("listen", "silent"),
        ("1", "$f(n)=n$, $g(n)=1$"),  # two equations
        ("0", "5x - 7y + 11z + 4 = 0"),
        ("4t", "4"),  # t may be an unknown
        ("9", r"\frac{x}{3}"),
        ("9", "f(x) = x + 9"),
    ],
)
def test_different(gold: str, answer: str) -> None:
    assert settled(gold, answer) is False


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/3", "0.333333"),  # rounding decides
        ("50%", "0.5"),
        (r"\sqrt{4}", "2"),
        ("x+1", "1+x"),
        ("5", r"x \in \{5\}"),
        ("10", "5C2"),
        ("12", "1 2"),
        ("5", "x >= 5"),
        ("1", "1/0"),
        ("7", "9" * 500),
        ("9", "9^9^9^9"),
    ],
)
def test_left_open(gold: str, answer: str) -> None:
    assert settled(gold, answer) is None


def test_numbers_are_exact() -> None:
    assert canonical("0.1").number == Fraction(1, 10)
    assert canonical("-1,234.50").number == Fraction(-2469, 2)
    assert canonical("1,23").number is None
    assert canonical("0." + "3" * 401).number is None


def test_nothing_equals_nothing() -> None:
    assert settled("", "") is False
