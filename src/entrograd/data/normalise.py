"""The form in which problems are compared: what differs only in dress becomes equal."""

from __future__ import annotations

import re
import unicodedata

from entrograd.storage.hashing import text_hash

_PLAIN = str.maketrans("\u2010\u2011\u2013\u2212\u2018\u2019", "----''")  # dashes, apostrophes
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_EXCLAMATION = re.compile(r"(?<=[^\W\d_][^\W\d_])!+")  # of a word; 5! and n! are factorials
_OPERATOR = re.compile(r"([-+*/=<>^×÷])")
_QUOTES = "\"'`\u201c\u201d"
_BEFORE = _QUOTES + "$\u00a1\u00bf\u2014"
_AFTER = _QUOTES + "$.,;:?\u2026\u2014"


def normalise(text: str) -> str:
    """Words and operators, one space apart, for comparison only.

    Unicode compatibility forms (NFKC), case, spacing, punctuation at the edge of words, hyphens
    between letters and commas between thousands make no difference; operators, decimal points,
    brackets and signs within words do, so that no two problems of arithmetic become one.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _THOUSANDS.sub("", text.translate(_PLAIN))
    text = _OPERATOR.sub(r" \1 ", _HYPHEN.sub(" ", _EXCLAMATION.sub("", text)))
    words = (word.lstrip(_BEFORE).rstrip(_AFTER) for word in text.split())
    return " ".join(word for word in words if word)


def content_number(problem: str) -> float:
    """The hash of the normalised problem as a number in [0, 1): fixed for ever by its words."""
    return int(text_hash(normalise(problem))[:13], 16) / 16**13


def prompt_id(problem: str, answers: tuple[str, ...]) -> str:
    """16 hex digits of the sha256 of a problem and its accepted answers, as they are written."""
    return text_hash(problem, *answers)[:16]
