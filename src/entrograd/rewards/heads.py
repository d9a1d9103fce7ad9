"""Reward heads beside correctness: ratings of a completion's text alone, for rewards of many parts.

A head is a function `(text, **options) -> score` in [0, 1]; the rating is the nearest of the five
points 0, 1/4, 1/2, 3/4, 1, since ENCORE measures the entropy of discrete ratings. It knows
neither the problem nor the accepted answers, so the same text always has the same rating.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entrograd.errors import InputError
from entrograd.rewards.params import Head
from entrograd.rewards.verify.extract import extract

Rate = Callable[[str], float]
Ratings = dict[str, float]  # by the head's name

_WORD = re.compile(r"[^\W\d_]{2,}")  # single letters are variables, not language
_COMMAND = re.compile(r"\\[A-Za-z]+")  # LaTeX's own words
_STEP = re.compile(r"(?<=[.!?。！？])\s+|(?<=[。！？])|\n")  # where a sentence or a line ends
_SAYS = re.compile(r"[^\W\d]|\d\s*[^\s\d.,]+\s*\d")  # words or a calculation, not a number alone
# Scripts that one text mixes by rule.
_FAMILIES = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HALFWIDTH": "CJK", "FULLWIDTH": "LATIN"}


def format_(text: str) -> float:
    r"""How plainly the final answer is marked: 1 the one `\boxed{}`, or the one line the completion
    consists of, is it; 3/4 boxed, but not once; 1/2 announced ("the answer is", "####"); 1/4 only
    found as the last number or formula; 0 no answer."""
    found = extract(text)
    if found is None:
        return 0.0
    if found.rule == "boxed":
        return 1.0 if text.count("boxed") == 1 else 0.75
    if found.rule in ("leading", "line"):
        return 1.0 if len(text.strip().splitlines()) == 1 else 0.5
    return 0.5 if found.rule == "anchor" else 0.25


def brevity(text: str, *, target: int = 400, longest: int = 2000) -> float:
    """1 up to `target` characters, then linear to 0 at `longest`."""
    if not 0 < target < longest:
        raise ValueError(f"target ({target}) must lie above 0 and below longest ({longest})")
    return 1 - (min(max(len(text), target), longest) - target) / (longest - target)


def repetition(text: str, *, ngram: int = 3) -> float:
    """The fraction of distinct ones among its sequences of `ngram` words; 1 where there is none."""
    if ngram < 1:
        raise ValueError(f"ngram ({ngram}) must be at least 1")
    words = text.lower().split()
    found = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return len(set(found)) / len(found) if found else 1.0


def language(text: str, *, script: str | None = None) -> float:
    """The fraction of letters that belong to `script` (LATIN, CYRILLIC, CJK, ... as Unicode names
    them; CJK holds kana too), by default to the script the text uses most. Words of one letter and
    LaTeX commands do not count; 1 without a word."""
    words = _WORD.findall(_COMMAND.sub(" ", text))
    letters = Counter(_script(letter) for word in words for letter in word)
    if not letters:
        return 1.0
    chosen = letters[script.upper()] if script else max(letters.values())
    return chosen / letters.total()


def steps(text: str, *, target: int = 4) -> float:
    """How many steps of reasoning there are, sentences or lines, of the `target` wanted; more
    earn no more."""
    if target < 1:
        raise ValueError(f"target ({target}) must be at least 1")
    found = sum(bool(_SAYS.search(step)) for step in _STEP.split(text))
    return min(found, target) / target


HEADS: dict[str, Callable[..., float]] = {
    "format": format_,
    "brevity": brevity,
    "repetition": repetition,
    "language": language,
    "steps": steps,
}


def load(heads: Mapping[str, Head]) -> dict[str, Rate]:
    """The rating function of each head, by name: text -> one of the five points.

    Raises:
        InputError: names the key of a function or an option that does not exist; when called, the
            head whose function raises or answers with anything but a number in [0, 1].
    """
    return {name: _rate(name, head) for name, head in heads.items()}


def ratings(rates: Mapping[str, Rate], text: str) -> Ratings | None:
    """The ratings of a completion; None if there are no heads."""
    return {name: rate(text) for name, rate in rates.items()} or None


def _rate(name: str, head: Head) -> Rate:
    where = f"params.yaml: annotate.heads.{name}"
    function = _function(where, head.function or name)

    def rate(text: str) -> float:
        try:
            score = function(text, **head.options)
        except Exception as error:
            raise InputError(
                f"{where}: {type(error).__name__}: {error}, on {text!r:.200}"
            ) from error
        good = isinstance(score, (int, float)) and math.isfinite(score) and 0 <= score <= 1
        if not good:
            raise InputError(f"{where}: a rating lies in [0, 1] (got {score!r} on {text!r:.200})")
        return math.floor(score * 4 + 0.5) / 4

    rate("")  # an option that is unknown or out of range shows before anything runs
    return rate


def _function(where: str, function: str) -> Callable[..., float]:
    if function in HEADS:
        return HEADS[function]
    module, colon, attribute = function.partition(":")
    if not colon:
        raise InputError(
            f"{where}: no head of that name; there are {', '.join(HEADS)}, or give function: "
            "MODULE:FUNCTION"
        )
    # A module beside params.yaml is found whatever script runs.
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{where}.function: {function}: {error}") from None
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise InputError(f"{where}.function: {function} is not a function")
    return found


def _script(letter: str) -> str:
    script = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return _FAMILIES.get(script, script)
