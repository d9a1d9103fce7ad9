"""Answers made to hang, crash or take over a grader, of many kinds and in endless variation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_MEGABYTE = 1_000_000
_COMMANDS = (
    *("\\frac", "\\sqrt", "\\left(", "\\right)", "\\begin{pmatrix}", "\\end{pmatrix}", "\\sum_"),
    *(
        "\\int",
        "\\boxed{",
        "\\text{",
        "\\{",
        "\\}",
        "\\\\",
        "\\cup",
        "\\infty",
        "\\pm",
        "\\log",
        "^",
    ),
    *(
        "\\lim_{x\\to",
        "\\binom",
        "\\overline{",
        "_",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "$",
        "&",
        "%",
        "#",
    ),
)
_CODE = (
    "__import__('os').system('touch pwned')",
    "().__class__.__bases__[0].__subclasses__()",
    "exec(open('pwned','w').write('1'))",
    "eval(compile('open(\"pwned\",\"w\")','','exec'))",
    "lambda: open('pwned','w')",
    'sympy.sympify(\'__import__("os").mkdir("pwned")\')',
    "\\input{/etc/passwd}",
    "\\write18{touch pwned}",
    "{{7*7}}${7*7}<script>alert(1)</script>'; drop table answers; --",
    "os.environ",
)


def _tower(rng: random.Random) -> str:
    base = rng.randint(2, 99)
    height = rng.randint(2, 12)
    powers = [str(rng.randint(2, 999)) for _ in range(height)]
    if rng.random() < 0.5:
        return f"{base}" + "".join(f"^{{{power}" for power in powers) + "}" * height
    return "^".join([str(base), *powers])


def _factorial(rng: random.Random) -> str:
    n = rng.choice([rng.randint(20, 999), rng.randint(10**4, 10**9)])
    forms = (
        "{n}!",
        "({n}!)!",
        "\\binom{{{n}}}{{{m}}}",
        "\\frac{{{n}!}}{{{m}!}}",
        "{n}!!",
        "\\Gamma({n})",
    )
    return rng.choice(forms).format(n=n, m=rng.randint(2, n))


def _decimal(rng: random.Random) -> str:
    digits = "".join(rng.choices("0123456789", k=rng.choice([50, 390, 450, 1900, 5000])))
    forms = (
        "{d}",
        "0.{d}",
        "{d}.{d}",
        "{d}e{e}",
        "1e{e}",
        "{d} \\times 10^{{{e}}}",
        "\\frac{{{d}}}{{3}}",
    )
    return rng.choice(forms).format(d=digits, e=rng.randint(1, 10**9))


def _recursion(rng: random.Random) -> str:
    depth = rng.choice([5, 30, 200, 600])
    opening, closing = rng.choice(
        [
            ("(", ")"),
            ("\\sqrt{", "}"),
            ("\\frac{1}{1+", "}"),
            ("f(", ")"),
            ("-(", ")"),
            ("\\{", "\\}"),
        ]
    )
    return opening * depth + "x" + closing * rng.choice([depth, depth, depth - 1])


def _endless(rng: random.Random) -> str:
    n = rng.randint(10**3, 10**12)
    forms = (
        "\\sum_{{k=1}}^{{{n}}} k^{{k}}",
        "\\prod_{{k=1}}^{{{n}}} (1+\\frac{{1}}{{k}})",
        "\\int_{{0}}^{{1}} x^{{x^{{x}}}} \\sin({n}x) dx",
        "\\lim_{{x \\to 0}} \\frac{{\\sin^{{{m}}} x}}{{x}}",
        "(x+1)^{{{m}}} - (x-1)^{{{m}}}",
        "\\sqrt[{m}]{{{n}}} + \\log_{{{m}}} {n}",
        "x^{{{m}}} + {n} x = 0",
        "{n} \\bmod {m}",
    )
    return rng.choice(forms).format(n=n, m=rng.randint(2, 999))


_KINDS: dict[str, Callable[[random.Random], str]] = {
    "tower of powers": _tower,
    "factorial": _factorial,
    "endless": _endless,
    "huge decimal": _decimal,
    "recursion": _recursion,
    "nested braces": lambda rng: "{" * rng.randint(1, 400) + "1" + "}" * rng.randint(1, 400),
    "unbalanced LaTeX": lambda rng: (
        " ".join(rng.choices(_COMMANDS, k=rng.randint(2, 40))) + str(rng.randint(0, 9))
    ),
    "megabytes": lambda rng: (
        rng.choice(["1", "{", "\\boxed{", "$", "answer is ", "\\frac{", " ", "9^"])
        * (_MEGABYTE // rng.randint(4, 9))
    ),
    "long": lambda rng: (
        rng.choice(["1,", "x+", "2^", "\\sqrt ", "(", "a ", "=1", "1 ", "\\text{a}"])
        * rng.randint(100, 990)
    ),
    "NUL and bidirectional": lambda rng: "".join(
        rng.choices("\x00\u202e\u2066\u2069\u200f\u200b\ufeff\x1b5x+ ", k=rng.randint(3, 99))
    ),
    "half surrogates": lambda rng: "\ud800" * rng.randint(1, 9) + str(rng.random()),
    "any character": lambda rng: "".join(
        chr(rng.randint(0, 0x2FFF)) for _ in range(rng.randint(1, 99))
    ),
    "code": lambda rng: rng.choice(_CODE) + " " * rng.randint(0, 3) + str(rng.randint(0, 9**9)),
    "no value": lambda rng: (
        rng.choice(["nan", "inf", "zoo", "None", "1/0", "\\frac{1}{0}", "0^0", "i^i"])
        + rng.choice(["", "+1", "-x", "!", "^{-1}", "\\%"])
    ),
    "soup": lambda rng: "".join(rng.choices("\\{}[]()^_$&%#~ 0x9!.,=<>|'", k=rng.randint(1, 99))),
}
# What really exhausts a limit costs that limit each time: rarer than its share.
_COSTLY = ("tower of powers", "factorial", "endless", "recursion", "long")
_FORMS = ("\\boxed{%s}", "The answer is %s", "%s", "$%s$", "\\boxed{%s", "#### %s\n")


def hostile(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(kind, completion) pairs: an answer in one of the places where one is looked for."""
    rng = random.Random(seed)
    cheap = [kind for kind in _KINDS if kind not in _COSTLY]
    for index in range(count):
        kind = _COSTLY[index // 8 % len(_COSTLY)] if index % 8 == 0 else cheap[index % len(cheap)]
        yield kind, rng.choice(_FORMS).replace("%s", _KINDS[kind](rng))
