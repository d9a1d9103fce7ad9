"""Values of answers: what is read agrees with math-verify's parser, which shares no code with it,
and what the values part math-verify takes for different."""

from __future__ import annotations

import json
import logging
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from latex2sympy2_extended.sets import FiniteSet as AnySet
from math_verify import parse, verify
from math_verify.grader import is_equation, take_last_relation

from entrograd.rewards.verify.equivalence import canonical, settle
from entrograd.rewards.verify.latex import point
from entrograd.rewards.verify.values import apart, read_values
from entrograd.rewards.verify.worker import _parser

SUITE = ("aime24", "amc23", "math500", "minerva", "olympiadbench")
# math-verify makes infinity of the minus 1 here, and words of these symbols.
MISREAD = {r"m_{p} c^{2}(\gamma^{2}-1) \sin ^{2} \theta", "E_1, E_2", "E_{1},E_{2}"}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def latex_of_golds(data: Path) -> list[str]:
    """The accepted answers of the five benchmarks that are no plain numbers or words."""
    found: dict[str, None] = {}
    for name in SUITE:
        with (data / "benchmarks" / f"{name}.jsonl").open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                given = row["answer"]
                for text in given if isinstance(given, list) else [given]:
                    answer = canonical(text)
                    if answer.number is None and not answer.word and not answer.choice:
                        found[answer.latex] = None
    return list(found)


def parts(found: Any) -> list[Any]:
    """The expressions in a parsed answer."""
    if isinstance(found, sympy.Interval):
        return [*parts(found.start), *parts(found.end)]
    if isinstance(found, sympy.MatrixBase):
        return [part for cell in found.flat() for part in parts(cell)]
    if isinstance(found, (sympy.Tuple, sympy.FiniteSet, AnySet)):
        return [part for member in found.args for part in parts(member)]
    return [found]


def value(expression: Any) -> complex:
    """At the point that verify/latex.py describes: i is the imaginary unit, f(x) is f x."""
    functions = expression.atoms(sympy.core.function.AppliedUndef)
    named = {f: sympy.Symbol(f.func.__name__.strip("\\").lower()) * f.args[0] for f in functions}
    expression = expression.subs(named)
    at = {u: sympy.I if str(u) == "i" else point(str(u)) for u in expression.free_symbols}
    return complex(sympy.N(expression.subs(at), 15))


def rounded(values: list[complex]) -> set[complex]:
    """To eight digits, so that nothing is left of what rounding left."""
    found = set()
    for each in values:
        digits = [
            0 if abs(x) < 1e-9 * abs(each) else float(f"{x:.8g}") for x in (each.real, each.imag)
        ]
        found.add(complex(*digits))
    return found


def test_values_are_those_of_another_parser(shared_data: Path) -> None:
    read = wrong = 0
    texts = latex_of_golds(shared_data)
    for text in texts:
        values = read_values(text)
        if values is None or text in MISREAD:
            continue
        read += 1
        (parsed, *_) = _parser()(f"\\boxed{{{text}}}")
        if is_equation(parsed):
            parsed = take_last_relation(parsed).rhs
        theirs = [value(part) for part in parts(parsed)]
        if rounded(theirs) != rounded(list(values.numbers)):
            wrong += 1
            print(text, values, theirs)
    assert wrong == 0
    assert read > 0.75 * len(texts)


def test_what_values_part_math_verify_takes_for_different(shared_data: Path) -> None:
    texts = [canonical(text) for text in latex_of_golds(shared_data)]
    plain = [canonical(text) for text in ("0", "1", "x = 2", "0.5", "-3")]
    rng = random.Random(0)
    pairs = [(rng.choice(texts), rng.choice(texts + plain)) for _ in range(150)]
    parted = 0
    for one, other in pairs:
        ours, theirs = read_values(one.latex), read_values(other.latex)
        if ours and theirs and apart(ours, theirs):
            parted += 1
            texts_of_pair = (f"\\boxed{{{answer.latex}}}" for answer in (one, other))
            assert not verify(*map(parse, texts_of_pair)), (one, other)
    assert parted > 75


@pytest.mark.parametrize(
    "equal",
    [
        (r"2\sqrt{2}", r"\sqrt{8}", r"\frac{4}{\sqrt{2}}", r"2^{3/2}", r"2 \cdot 2^{\frac{1}{2}}"),
        (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", r"\{1 - \sqrt{2}, 1 + \sqrt{2}\}"),
        ("x^2-1", "(x+1)(x-1)", "(X-1)(X+1)", "x^{2} - 1"),
        (r"(1, \frac{1}{2})", "[1, 0.5]", r"\left(1, 1/2\right)", r"\{0.5, 1, 1\}"),
        (r"\begin{pmatrix} 1 \\ x+2 \end{pmatrix}", r"\begin{bmatrix} 1 & 2+x \end{bmatrix}"),
        ("1+2i", "2i+1", r"\frac{4i+2}{2}"),
        (r"e^{i\pi/3}", r"\frac{1}{2}+\frac{\sqrt{3}}{2}i"),
        (r"\sin^2 x", r"1-\cos^2 x"),
        (r"\ln 8", r"3\ln 2"),
        (r"\log_2 x", r"\frac{\ln x}{\ln 2}", r"\frac{\log_{10} x}{\log_{10} 2}"),
        (r"\sqrt{-3}", r"i\sqrt{3}", r"\sqrt{3}i"),
        ("f(x)+f(x)", "2f(x)"),
        (r"\frac{5!}{2^{3}}", "15", "x=15"),
        (r"\lfloor x\rfloor + 1", r"\lceil x\rceil"),
        (r"\omega_0 t", r"t\omega_{0}"),
        (r"\frac{1}{2} x", r"\frac{x}{2}"),
        ("ab", "a b", r"a \cdot b", "ba"),
        ("y=2x", "x=y/2", "2x=y"),
    ],
)
def test_equal_answers_are_never_parted(equal: tuple[str, ...]) -> None:
    for one, other in permutations(equal, 2):
        ours, theirs = read_values(one), read_values(other)
        assert ours, one
        assert theirs, other
        assert not apart(ours, theirs), (one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"2\sqrt{5}", "10"),
        (r"1024-256 \pi", "31"),
        ("(1,2)", "(1,3)"),
        ("1, 2", "1, 2, 3"),
        (r"1 \pm \sqrt{19}", "27"),
        ("x+1", "y+1"),
        ("y=2x", "y=2x+1"),
        ("x = 3", "d = 2k"),
        (r"\frac{1}{x}", "x"),
    ],
)
def test_different_answers_are_parted(one: str, other: str) -> None:
    ours, theirs = read_values(one), read_values(other)
    assert ours
    assert theirs
    assert apart(ours, theirs)
    assert apart(theirs, ours)
    assert settle(canonical(one), canonical(other)) is False


@pytest.mark.parametrize(
    "text",
    [
        *("1/2x", "x^10", r"\sin x y", r"\sin^{-1} x", r"\log 2", "2 3", r"1\frac{1}{2}", "3!!"),
        *(
            "1,234",
            "(312,123)",
            "50%",
            "5 m",
            r"2\sqrt{3} cm",
            "2 or 3",
            "x or 2",
            "pi",
            "infinity",
        ),
        *(r"\frac{dx}{dt}", "x < 3", r"x \in [1,2]", r"(0,9) \cup (9,36)", r"(2, \infty)"),
        *(r"\sin(\pi)", "10^{200000}", "0/0", r"\ln 0", "(10^{30}+1)-10^{30}", "171!"),
        *("", "(", "1+", ")", "x=", "=1", "1,,2", r"\frac{1}", "x=1, y=2", "(((((((((((((1"),
        *(r"x=1 \text{ or } x=2", "one hundred and 5", r"\pm 1 \pm 2"),
    ],
)
def test_what_may_mean_two_things_has_no_values(text: str) -> None:
    assert read_values(text) is None


@given(st.text(alphabet=r"\{}()[]^_+-*/=,&!.0123xyei pmdsqrtfracln", max_size=60))
def test_any_text_is_read_or_not(text: str) -> None:
    values = read_values(text)
    assert values is None or all(abs(value) >= 0 for value in values.numbers)
