"""Every kind of answer, graded end to end: (accepted answer, answer) pairs that are equal, and that
are not. What reads as an opinion is one: docs/grading.md says which rule decides."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrograd.rewards.params import GraderParams
from entrograd.rewards.verify.equivalence import canonical, settle
from entrograd.rewards.verify.grade import Grader
from entrograd.rewards.verify.units import parse_unit

EQUAL = {
    "units": [
        ("5 cm", "5"),
        ("5", "5 cm"),
        ("5 m", "5 meters"),
        ("5 m", "500 cm"),
        (r"5\text{ cm}^2", "5 square centimeters"),
        (r"5\text{ cm}^2", r"5\,\mathrm{cm}^2"),
        (r"5 \text{ cm}^2", "5"),
        ("12 hours", "12 hrs"),
        ("2 hours", "120 minutes"),
        ("60 km/h", "60 kilometers per hour"),
        ("60 mph", "60 miles per hour"),
        ("$5", "5 dollars"),
        (r"\$5.00", "5"),
        ("$1,000", "1000"),
        ("5 dollars", "500 cents"),
        ("12 students", "12"),
        ("3 apples", "3 apples"),
        (r"90^\circ", "90 degrees"),
        ("5 million", "5000000"),
        ("5 kg", "5000 g"),
        (r"10\text{ miles}", "10 mi"),
        (r"\frac{1}{2}\text{ inch}", "0.5 in"),
        ("5", "5 units"),
        ("15", r"15\text{ units}^2"),
        (r"8 \text{ inches}", "8"),
        (r"4\pi \text{ cm}^2", r"4\pi"),
        (r"4\pi \text{ cm}^2", r"4\pi \text{ square centimeters}"),
        (r"2\sqrt{3}\text{ cm}", r"\sqrt{12}"),
    ],
    "percent": [
        (r"50\%", "50%"),
        ("50%", "50 percent"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("50", "50%"),
        ("0.5", "50%"),
        (r"\frac12", r"50\%"),
        ("12.5%", "1/8"),
        ("150%", "1.5"),
    ],
    "numbers": [
        ("1/3", "0.333333"),
        ("0.1", "1/10"),
        ("1e3", "1000"),
        (r"1.5\times10^3", "1500"),
        (r"1.5 \cdot 10^{-3}", "0.0015"),
        ("1 1/2", "3/2"),
        (r"1\frac{1}{2}", "1.5"),
        (r"12\frac{3}{5}", "12.6"),
        (r"-1\frac12", "-1.5"),
        ("--5", "5"),
        ("+5", "5"),
        ("1,234", "1234"),
        ("1 234", "1234"),
        ("0", "-0"),
        ("0.0", "0"),
        ("10^2", "100"),
        ("2^{10}", "1024"),
        (r"\infty", "infinity"),
        ("2+3i", "3i+2"),
        ("Five", "five"),
        ("5.", "5"),
        (r"\frac{-1}{2}", r"-\frac{1}{2}"),
        (r"\frac{1}{-2}", "-0.5"),
        (r"0.\overline{3}", "1/3"),
        (r"0.\overline{142857}", r"\frac17"),
        ("100_2", "100"),
        ("2516_8", "2516_8"),
        ("2516_8", "2516"),
        ("2516_{8}", "2516_8"),
    ],
    "expressions": [
        ("x+1", "1+x"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\sqrt{8}", r"2\sqrt2"),
        (r"\sqrt[3]{8}", "2"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"),
        (r"\sin(x)", r"\sin x"),
        ("e^{x}", r"\exp(x)"),
        (r"\log_2 8", "3"),
        (r"\binom{5}{2}", "10"),
        ("5!", "120"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("y=2x+1", "2x+1"),
        ("y=2x+1", "y=1+2x"),
        ("2x+y=1", "y=1-2x"),
        ("f(x)=x^2", "x^2"),
        ("|x|", r"\lvert x\rvert"),
        (r"\pi", "3.14159265"),
        (r"\sqrt{2}", "1.414214"),
        ("n(n+1)/2", r"\frac{n(n+1)}{2}"),
        (r"\frac{n^2+n}{2}", "n(n+1)/2"),
        (r"x \in \mathbb{R}", r"\mathbb{R}"),
        ("-x+3", "3-x"),
        (r"2\cdot 3", "6"),
        ("ab", "ba"),
        (r"\theta", r"\theta"),
        (r"\cot x", r"\frac{1}{\tan x}"),
    ],
    "intervals": [
        ("[1,2]", "[1, 2]"),
        ("[0,1)", r"0 \le x < 1"),
        (r"0 \le x < 1", "[0,1)"),
        (r"(-\infty, 3]", r"x \le 3"),
        (r"x \le 3", r"(-\infty,3]"),
        ("x<3", "3>x"),
        (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"),
        (r"[\frac12, 1]", "[0.5,1]"),
        ("[-2,7]", r"x\in[-2,7]"),
        (r"x\in[-2,7]", "[-2,7]"),
        (r"[0, \infty)", r"x \geq 0"),
        ("-2<x<3", "(-2,3)"),
        ("[2,5)", r"[2, 5)\text{.}"),
        (r"(0, 9) \cup (9, 36)", r"(0,9)\cup (9,36)"),
    ],
    "sets": [
        (r"\{1,2,3\}", r"\{3,2,1\}"),
        (r"\{1,2\}", "1,2"),
        ("1,2", "2,1"),
        ("1, 2", "1 and 2"),
        ("1,2", r"\{1,2\}"),
        (r"\{1,2,2\}", r"\{1,2\}"),
        ("x=1,x=2", "1,2"),
        (r"x=1 \text{ or } x=2", "1,2"),
        ("1,2", r"x=1\text{ or }x=2"),
        (r"\pm 2", "2,-2"),
        ("2,-2", r"\pm 2"),
        (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
        (r"\emptyset", r"\{\}"),
        (r"\{\frac12, 3\}", r"\{3, 0.5\}"),
        ("-2,1", r"x=1 \text{ and } x=-2"),
        (r"\frac{1}{2},-\frac{1}{3}", r"-\frac13, \frac12"),
        ("3,5,7", "3, 5, and 7"),
    ],
    "tuples": [
        ("(1,2)", "(1, 2)"),
        ("(1,2,3)", "(1,2,3)"),
        ("(1,2)", "1,2"),
        (r"(\frac12,3)", "(0.5,3)"),
        ("(x,y)=(1,2)", "(1,2)"),
        ("(1,2)", "(x,y)=(1,2)"),
        ("(1,2),(3,4)", "(3,4),(1,2)"),
        (r"\left(3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
        ("(1,2)", "x=1, y=2"),
        ("(1,2)", r"\left(1,2\right)"),
        ("(6,31,-1)", "(6, 31, -1)"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        (r"\begin{pmatrix}1/2\\3\end{pmatrix}", r"\begin{pmatrix}0.5\\3\end{pmatrix}"),
        (
            r"\begin{pmatrix}\frac12\\3\end{pmatrix}",
            r"\begin{pmatrix}\frac{1}{2}\\[2pt]3\end{pmatrix}",
        ),
        (r"\begin{pmatrix}\sqrt{4}&0\\0&1\end{pmatrix}", r"\begin{pmatrix}2&0\\0&1\end{pmatrix}"),
        (
            r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
            r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \\ \frac{5}{3} \end{pmatrix}",
        ),
    ],
    "choices": [
        ("A", "(A)"),
        ("A", "A."),
        ("A", "a"),
        ("A", r"\text{A}"),
        ("A", r"\text{(A)}"),
        ("A", r"\textbf{A}"),
        (r"\text{(E)}", "E"),
        ("A", "A) 5"),
        ("A", "(A) 5"),
        ("C", r"\textbf{(C)}\ 12"),
        ("A", "Option A"),
        ("A,C", "A, C"),
        ("A,C", "C,A"),
        ("A,C", "A and C"),
    ],
    "text": [
        (r"\text{even}", "even"),
        ("Evelyn", r"\text{Evelyn}"),
        ("yes", "Yes"),
        ("No", "no."),
        ("Tuesday", "tuesday"),
        (r"\text{hyperbola}", "a hyperbola"),
        (r"\text{two-pair}", "two pair"),
        ("Navin", "navin"),
        (r"\text{June 20}", "June 20"),
        ("0.5 N", r"0.5\text{ N}"),
        (r"\text{6 and 7}", "6, 7"),
        ("10:30", "10:30"),
        ("10:30 am", "10:30"),
        ("3:4", "3/4"),
        ("3:4", "3 : 4"),
        (r"\text{circle}", r"\mathrm{circle}"),
        ("the circle", "circle"),
    ],
}

DIFFERENT = {
    "units": [
        ("5 cm", "5 km"),
        ("5 m", "500"),
        ("5 m", "5 m^2"),
        ("2 hours", "2 days"),
        ("60 km/h", "60 m/s"),
        ("5 dollars", "5 cents"),
        ("12 students", "12 people"),
        ("90 degrees", r"\frac{\pi}{2}"),
        ("5 million", "5"),
        ("5 kg", "5 g"),
    ],
    "percent": [
        ("50%", "5"),
        ("0.5", "0.5%"),
        ("5%", "0.5"),
    ],
    "numbers": [
        ("1/3", "0.33"),
        ("3.14", r"\pi"),
        ("-5", "5"),
        ("1.234,5", "1234.5"),
        ("1e400", "1"),
        ("100!", "1"),
        ("1", "1/0"),
        (r"\infty", "1"),
        (r"-\infty", r"\infty"),
        ("i", "1"),
        ("0.9999999", "1"),
        ("1000001", "1000000"),
        ("five", "5"),
        ("11_2", "11_3"),
    ],
    "expressions": [
        ("x+1", "x-1"),
        ("2x", "2y"),
        (r"\ln 2", r"\log 2"),
        ("x=5", "y=5"),
        ("x+y=1", "x+y=2"),
        (r"\sqrt2", "1.4"),
        ("a^2", "a^3"),
        ("4t", "4"),
        (r"10\sqrt{3}", "17.32"),
        (r"\theta", r"\phi"),
        ("p - q", "q-p"),
    ],
    "intervals": [
        ("(1,2]", "[1,2]"),
        ("(1,2)", "[1,2]"),
        ("x<3", r"x \le 3"),
        (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)"),
        (r"[1,2)\cup(2,3]", "[1,3]"),
        ("(1,2)", "(1,3)"),
        ("-2<x<3", "-2<x<4"),
    ],
    "sets": [
        (r"\{1,2,3\}", r"\{1,2\}"),
        ("1,2,3", "1,2,4"),
        ("1,-2", "1,2"),
        ("1", "1,2"),
        ("1,2", "1"),
        (r"\{1,2\}", "(1,2)"),
    ],
    "tuples": [
        ("(1,2)", "(2,1)"),
        ("(1,2,3)", "(3,2,1)"),
        ("(1,2),(3,4)", "(1,2),(4,3)"),
        ("(1,2,3)", "(1,2)"),
        ("(1,2)", r"\langle 1,2\rangle"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    ],
    "choices": [
        ("A", "B"),
        ("B", "AB"),
        ("A,C", "A"),
    ],
    "text": [
        ("even", "odd"),
        ("yes", "True"),
        ("blue", "red"),
        ("listen", "silent"),
        (r"\text{neither even nor odd}", "neither"),
        ("east", "west"),
        (r"\text{June 20}", "June 21"),
        ("", "5"),
        ("10:30", "10:31"),
        ("3:4", "3:5"),
        ("parallel", "perpendicular"),
    ],
}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GraderParams(workers=1)) as opened:
        yield opened


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_and_different(grader: Grader, kind: str) -> None:
    for pairs, expected in ((EQUAL[kind], True), (DIFFERENT[kind], False)):
        outcomes = grader.compare([((gold,), answer) for gold, answer in pairs])
        wrong = [
            (*pair, outcome)
            for pair, outcome in zip(pairs, outcomes, strict=True)
            if outcome.kind != "done" or outcome.value is not expected
        ]
        assert wrong == []


def spellings(number: Fraction) -> list[str]:
    """Ways to write one number."""
    p, q, sign = abs(number.numerator), number.denominator, "-" if number < 0 else ""
    written = [
        rf"{sign}\frac{{{p}}}{{{q}}}",
        f"{sign}{p}/{q}",
        rf"${sign}\dfrac{{{3 * p}}}{{{3 * q}}}$",
    ]
    if q == 1:
        written += [
            f"{sign}{p:,}",
            f"{sign}{p}.0",
            f"{sign}{p} apples",
            f"{sign}{p:,}".replace(",", "{,}"),
        ]
    elif p > q:
        written += [f"{sign}{p // q} {p % q}/{q}", rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}"]
    return written


@given(
    st.fractions(min_value=-9999, max_value=9999, max_denominator=99),
    st.fractions(min_value=-9999, max_value=9999, max_denominator=99),
)
def test_a_number_is_itself_however_it_is_written(one: Fraction, other: Fraction) -> None:
    """The oracle is Python's own fraction. Closer than rounding no two of these are."""
    for a in spellings(one):
        assert canonical(a).number == one
        for b in spellings(other):
            assert settle(canonical(a), canonical(b)) is (one == other)


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_breaks_the_canonical_form(one: str, other: str) -> None:
    assert settle(canonical(one), canonical(other)) in (True, False, None)
    same = canonical(one)
    assert settle(same, same) is not False or not same.key


@pytest.mark.parametrize(
    ("text", "same", "times"),
    [
        ("km/h", "m/s", Fraction(1000, 3600)),
        ("miles per hour", "ft/s", Fraction(5280, 3600)),
        ("square yards", "ft^2", Fraction(9)),
        ("N", "kg m/s^2", Fraction(1)),
        ("liters", "cm^3", Fraction(1000)),
        ("meters per second squared", "cm/s^2", Fraction(100)),
        ("lb", "oz", Fraction(16)),
        ("yards", "inches", Fraction(36)),
        ("days", "hours", Fraction(24)),
    ],
)
def test_units_convert(text: str, same: str, times: Fraction) -> None:
    one, other = parse_unit(text), parse_unit(same)
    assert one is not None
    assert other is not None
    assert one.dimension == other.dimension
    assert one.factor / other.factor == times


@pytest.mark.parametrize("text", ["", "apples", "m^", "5", "per", "cm cm cm " * 9, "x", "/"])
def test_what_is_no_unit(text: str) -> None:
    assert parse_unit(text) is None
