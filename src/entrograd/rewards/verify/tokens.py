"""Tokens of the LaTeX that answers are written in."""

from __future__ import annotations

import re
from collections.abc import Iterator

from entrograd.rewards.verify.units import parse_unit

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<letters>[A-Za-z]+)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<mark>\\\\|\\[{}]|[-+*/^_(){}\[\],&!]))\s*"
)
_SUBSCRIPT = re.compile(r"\s*_\s*(?:([A-Za-z0-9])|\{\s*([A-Za-z0-9]+)\s*\})\s*")
_LETTERS = re.compile(r" *[A-Za-z]+(?: +[A-Za-z]+)* *")
_NAMES = {"pi", "inf", "infinity", "or"}  # they have a meaning of their own
_GREEK = {
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa", "lambda"),
    *("mu", "nu", "xi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega", "Gamma", "Delta"),
    *("Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega"),
}
TIMES = ("*", "\\cdot", "\\times")
_NO_FACTORS = {*TIMES, "\\pm", "\\rfloor", "\\rceil"}


class UnreadableError(Exception):
    """A text is not of the part of LaTeX that is read."""


def tokens(text: str) -> Iterator[str]:
    """Numbers, letters and Greek ones with their subscripts, other commands, marks. UnreadableError
    if there is anything else, or words or units beside mathematics."""
    if _LETTERS.fullmatch(text):
        if text.strip() in _NAMES:
            raise UnreadableError
        yield from text.replace(" ", "")
        return
    place, last = 0, ""
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise UnreadableError
        place, kind = match.end(), match.lastgroup or ""
        last = match.group(kind)
        symbol = kind == "letters" or (kind == "command" and last in _GREEK)
        subscript = _SUBSCRIPT.match(text, place) if symbol else None
        ending = ""
        if subscript:
            place = subscript.end()
            ending = f"_{subscript.group(1) or subscript.group(2)}"
        if kind == "letters":
            if len(last) > 2 or last in _NAMES or (len(last) == 2 and parse_unit(last)):
                raise UnreadableError  # a word
            yield from last[:-1]
            yield last[-1] + ending
        elif kind == "command" and last not in ("left", "right"):
            yield f"\\{last}{ending}"
        elif kind != "command":
            yield last
        last += ending
    if last.isalpha() and parse_unit(last):  # 5 m
        raise UnreadableError


def begins_factor(token: str) -> bool:
    """Whether a token multiplies what stands before it, without a sign."""
    command = token[:1] == "\\" and token[1:2].isalpha() and token not in _NO_FACTORS
    return token[:1].isalpha() or token == "(" or command


def is_number(token: str) -> bool:
    return token[:1].isdigit() or token[:1] == "."


def is_unknown(token: str) -> bool:
    """Whether it is a letter, maybe a Greek one, with or without a subscript."""
    letter = token.split("_")[0]
    return letter[1:] in _GREEK if letter[:1] == "\\" else len(letter) == 1 and letter.isalpha()


def name(token: str) -> str:
    """The name of an unknown, in lower case: to symbolic comparison x is X."""
    return token.removeprefix("\\").lower()
