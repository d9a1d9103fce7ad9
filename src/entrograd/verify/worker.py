r"""The process that compares answers symbolically with math-verify, one pair a request.

Run as `python -m entrograd.verify.worker MEMORY_MB SECONDS` by entrograd.executor, whose limits
replace math-verify's own: those are exceptions, which code that catches all of them swallows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

from entrograd.executor import serve


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


def symbolically_equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes `answer` (LaTeX) for `gold`; the order of the two matters to it."""
    from math_verify import verify

    parse = _parser()
    return bool(
        verify(
            parse(f"\\boxed{{{gold}}}"),
            parse(f"\\boxed{{{answer}}}"),
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
