r"""The final answer of a completion, as text. String work alone, in time linear in the completion.

Rules are tried in order; the first that finds something gives the answer and its name:

- `boxed`: the content of the last `\boxed{...}` that is closed and not empty.
- `anchor`: what follows the last "answer is", "answer:" or "####".
- `leading`: the first line, if it is nothing but a number. A model shown worked examples writes
  its answer first and may go on inventing examples.
- `last`: the number or the piece of marked-up mathematics (`$...$`, `\(...\)`, `\[...\]`) that
  ends last.
- `line`: the whole completion, if it is one short line: answers that are words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

MAX_ANSWER = 2000  # characters; anything longer is no answer
_CLAUSE = 1000  # characters searched after an anchor
_TAIL = 4000  # characters searched for the last number or formula
_LINE = 64  # longest line that may be an answer in words


class Extraction(NamedTuple):
    """An answer and the rule that found it."""

    answer: str
    rule: str


INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
PLAIN = rf"(?:{INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
FRAC = r"\\[dtc]?frac\s?\{-?[0-9]+\}\s?\{-?[0-9]+\}"
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_.])(?:(?<![)\]}}])[-+−])?\$?(?:{INTEGER}?{FRAC}"
    rf"|{PLAIN}(?:[eE][-+]?[0-9]+|/[0-9]+)?)(?:\s?\\?%)?"
)
_LEADING = re.compile(rf"[-+−]?\s?\\?\$?(?:{FRAC}|{PLAIN}(?:/[0-9]+)?)\s?\\?%?")
_BOX = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANCHOR = re.compile(r"(?i:\banswer[*_ \t]{0,8}(?:is\b|:|=))|####")
_SPAN = re.compile(
    r"\$\$(?P<a>[^$]{1,500}?)\$\$|\$(?=\S)(?P<b>[^$]{1,500}?)(?<=\S)\$(?![0-9])"
    r"|\\\((?P<c>.{1,500}?)\\\)|\\\[(?P<d>.{1,500}?)\\\]",
    re.DOTALL,
)
_SENTENCE = re.compile(r"\n|[.!?](?=\s|$)")
_CHOICE = re.compile(r"[*_]{0,2}\(([A-Z])\)(?:\s|[*_.:,]|$)")
_FORMULA = re.compile(
    r"(?:\\(?:text|mathrm|textbf|operatorname)\s?\{[^{}]{0,80}\}|\\[A-Za-z]+|\\.|[^A-Za-z\\]"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))*"
)


def extract(text: str, rules: Sequence[str] | None = None) -> Extraction | None:
    """The final answer of a completion, or None if no rule finds one.

    `rules` names the rules to try, in order (all of RULES by default).
    """
    for rule in rules if rules is not None else RULES:
        answer = RULES[rule](text)
        if answer is not None and (answer := trim(answer)) and len(answer) <= MAX_ANSWER:
            return Extraction(answer, rule)
    return None


def trim(text: str) -> str:
    """`text` without white space and invisible characters at its ends."""
    start, end = 0, len(text)
    while start < end and _invisible(text[start]):
        start += 1
    while end > start and _invisible(text[end - 1]):
        end -= 1
    return text[start:end]


def _invisible(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf")


def _boxed(text: str) -> str | None:
    """Braces are matched in one pass; of nested boxes the innermost counts."""
    if "boxed" not in text:
        return None
    opened: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for token in _BOX.finditer(text):
        mark = token.group()
        if mark == "}":
            if opened:
                boxed, start = opened.pop()
                later = best is None or start > best[0]
                if boxed and later and text[start : min(token.start(), start + 100)].strip():
                    best = (start, token.start())
        elif mark.endswith("{") and mark != "\\{":
            opened.append((mark != "{", token.end()))
    return text[slice(*best)] if best else None


def _anchor(text: str) -> str | None:
    end = -1
    for match in _ANCHOR.finditer(text):
        end = match.end()
    if end < 0:
        return None
    clause = text[end : end + _CLAUSE].lstrip(" \t\r\n:=*_")
    if span := _SPAN.match(clause):
        return _inside(span)
    sentence = _SENTENCE.split(clause, maxsplit=1)[0].strip()
    if choice := _CHOICE.match(sentence):
        return choice.group(1)
    formula = _FORMULA.match(sentence)
    assert formula is not None
    if formula.end() == len(sentence):
        return _bare(sentence)
    if any(character.isdigit() for character in formula.group()):
        return _bare(re.sub(r"\s[A-Za-z]?\s*$", "", formula.group()))
    return _last(sentence) or _bare(sentence)


def _leading(text: str) -> str | None:
    start = text.lstrip()[:_CLAUSE]
    line = _bare(start.split("\n", maxsplit=1)[0])
    return line if _LEADING.fullmatch(line) else None


def _last(text: str) -> str | None:
    tail = text[-_TAIL:]
    spans = list(_SPAN.finditer(tail))
    places = [
        (match.end(), -match.start(), _inside(match))
        for match in spans
        if any(character in "0123456789" for character in match.group())
    ]
    places += [(match.end(), -match.start(), match.group()) for match in _NUMBER.finditer(tail)]
    if places:
        return max(places)[2]
    return _inside(spans[-1]) if spans else None


def _line(text: str) -> str | None:
    line = text.strip()
    whole = len(line) <= _LINE and len(line.splitlines()) == 1
    return _bare(line) if whole and any(character.isalnum() for character in line) else None


def _inside(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)


def _bare(text: str) -> str:
    """`text` without emphasis around it and punctuation after it."""
    return text.strip().strip("*_").rstrip(" ,;:.!?").strip("*_ ")


RULES: dict[str, Callable[[str], str | None]] = {
    "boxed": _boxed,
    "anchor": _anchor,
    "leading": _leading,
    "last": _last,
    "line": _line,
}
