r"""The process that compares answers symbolically with math-verify, one pair per request.

Run as `python -m entrograd.rewards.verify.worker MEMORY_MB SECONDS` by the sandbox, whose limits
replace math-verify's own: those are exceptions, which code that catches all of them swallows.
"""

from __future__ import annotations

import cmath
import contextlib
import functools
import logging
from collections.abc import Callable

from entrograd.rewards.sandbox_worker import serve
from entrograd.rewards.verify.latex import point
from entrograd.rewards.verify.numbers import read_number
from entrograd.rewards.verify.values import Values, apart


@functools.cache
def _parser() -> Callable[[str], list[object]]:
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


@functools.lru_cache(maxsize=2048)
def _parsed(latex: str) -> list[object]:
    return _parser()(f"\\boxed{{{latex}}}")


@functools.lru_cache(maxsize=8192)
def _values(latex: str) -> Values | None:
    """The value of an answer that is an expression, or of an equation's last side. Plain numbers
    need no parser."""
    from math_verify.grader import is_equation, take_last_relation

    number = read_number(latex)
    if number is not None and number.unit is None and not number.percent:
        with contextlib.suppress(OverflowError):
            return Values((complex(number.value),))
    parsed = _parsed(latex)
    equation = bool(parsed) and is_equation(parsed[0])
    side = take_last_relation(parsed[0]).rhs if equation else parsed[0] if parsed else None
    value = _value(side)
    return None if value is None else Values((value,), (latex,) if equation else ())


def _value(expression: object) -> complex | None:
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
        value = complex(sympy.N(expression.subs({u: point(str(u)) for u in unknowns}), 15, maxn=60))
    except Exception:
        return None
    return value if cmath.isfinite(value) else None


def symbolically_equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes `answer` (LaTeX) for `gold`; the order of the two matters to it.

    Expressions with different values at one point are different: most pairs end there.
    """
    from math_verify import verify

    one, other = _values(gold), _values(answer)
    return not (one and other and apart(one, other)) and bool(
        verify(
            _parsed(gold),
            _parsed(answer),
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def _answer(pair: tuple[str, str]) -> bool:
    return symbolically_equal(*pair)


def _prepare() -> None:
    """Import everything and parse some of everything once: forks inherit what that loads."""
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
    serve(_answer, _prepare)
