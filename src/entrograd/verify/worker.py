r"""The process that compares answers symbolically with math-verify, one pair a request.

Run as `python -m entrograd.verify.worker MEMORY_MB SECONDS` by entrograd.executor, whose limits
replace math-verify's own: those are exceptions, which code that catches all of them swallows.
"""

from __future__ import annotations

import cmath
import contextlib
import functools
import logging
import zlib
from typing import Any, NamedTuple

from entrograd.executor import serve
from entrograd.verify.numbers import read_number

_NEAR = 1e-5  # of the larger: as far as decimals may be rounded (entrograd.verify.equivalence)


@functools.cache
def _parser() -> Any:
    """LaTeX alone: math-verify's parser of plain expressions would evaluate them as Python, and
    its search for anything readable would take a number out of the middle of an answer."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
        ),
    )
    return functools.partial(
        parse,
        extraction_config=[config],
        extraction_mode="first_match",
        parsing_timeout=None,
        raise_on_error=True,
    )


class _Side(NamedTuple):
    """The value of an answer that is a plain expression, or of an equation's last side, where every
    unknown is a number that its name decides; None where there is none."""

    equation: bool
    value: complex | None


@functools.lru_cache(maxsize=2048)
def _parsed(latex: str) -> list[Any]:
    return _parser()(f"\\boxed{{{latex}}}")


@functools.lru_cache(maxsize=8192)
def _side(latex: str) -> _Side:
    """Plain numbers need no parser."""
    from math_verify.grader import is_equation, take_last_relation

    number = read_number(latex)
    if number is not None and number.unit is None and not number.percent:
        with contextlib.suppress(OverflowError):
            return _Side(False, complex(number.value))
    found = _parsed(latex)
    equation = bool(found) and is_equation(found[0])
    side = take_last_relation(found[0]).rhs if equation else found[0] if found else None
    return _Side(equation, _value(side))


def _value(expression: Any) -> complex | None:
    import sympy
    from sympy.concrete.expr_with_limits import ExprWithLimits

    if not isinstance(expression, sympy.Expr) or expression.is_Symbol:
        return None
    if expression.has(sympy.UnevaluatedExpr, ExprWithLimits):
        return None  # percentages have rules of their own; sums may not end
    unknowns = expression.free_symbols
    if unknowns and all(argument.is_Symbol for argument in expression.args):
        return None  # a product of letters may be a word
    try:
        point = {u: 1 + zlib.crc32(str(u).encode("utf-8", "replace")) / 2**32 for u in unknowns}
        value = complex(sympy.N(expression.subs(point), 15, maxn=60))
    except Exception:
        return None
    return value if cmath.isfinite(value) else None


def _differ(one: _Side, other: _Side) -> bool:
    """Whether their values show that they are different."""
    a, b = one.value, other.value
    if a is None or b is None or (one.equation and other.equation):
        return False  # two equations may be equal though their sides differ
    return abs(a - b) > _NEAR * max(abs(a), abs(b))


def symbolically_equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes `answer` (LaTeX) for `gold`; the order of the two matters to it.

    Expressions with different values at one point are different: most pairs end there.
    """
    from math_verify import verify

    return not _differ(_side(gold), _side(answer)) and bool(
        verify(
            _parsed(gold),
            _parsed(answer),
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def _prepare() -> None:
    """Import everything and let the parser meet its grammar once: forks inherit both."""
    logging.disable(logging.CRITICAL)
    for gold, answer in _GRAMMAR:
        with contextlib.suppress(Exception):  # a process without it works as well, only slower
            symbolically_equal(gold, answer)


_GRAMMAR = [
    (r"\frac{\pi}{2} + e^{-2x}", "0.5 x - 7"),
    (r"x^2 + 1", r"\sqrt{\sqrt{x}} \cdot 2^{n!}"),
    (r"\log_2 5 + \sin x", r"\{1, 2\}"),
    (r"(1, 2]", r"[1, \infty)"),
    (r"x \le 3", r"x = -1"),
    (r"\begin{pmatrix} 1 & x \end{pmatrix}", r"\sum_{n=1}^{3} n"),
]


if __name__ == "__main__":
    serve(lambda pair: symbolically_equal(pair[0], pair[1]), _prepare)
