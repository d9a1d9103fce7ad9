"""Training problems that overlap an evaluation's: equal after normalisation, sharing long
sequences of words, after the n-gram overlap of GPT-3 (arXiv 2005.14165v4, appendix C), or holding
a short one whole."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from entrograd.data.normalise import normalise

# A sequence in more than this fraction of the training problems, and in at least this many of them,
# is the wording of a template ("State the final answer to ..."), not of a problem.
TEMPLATE_FRACTION = 0.05
TEMPLATE_ROWS = 20
# A benchmark's problem of fewer words, those without letter or digit not counted ("What is 2 + 2?"
# has four), is too short to identify: it occurs in longer problems by chance.
FEWEST_WORDS = 5
EXAMPLES = 5
BUCKETS = 2**20  # of hashes: 8 MiB

# How a training problem overlaps a benchmark's, in the order of search.
KINDS = {
    "exact": "equal",
    "ngram": "by sequences of the training problem",
    "benchmark_ngram": "by sequences of the benchmark's",
    "contains": "containing a short one of the benchmark",
}


@dataclass(frozen=True)
class Match:
    """A benchmark problem that a training problem overlaps."""

    benchmark_row: int  # index into the benchmark's problems
    kind: str  # one of KINDS
    fraction: float  # of the sequences of the training problem (ngram) or the benchmark's


class Example(TypedDict):
    """An overlap, for a reader; rows count from 1."""

    benchmark: str
    kind: str
    fraction: float
    train_row: int | str
    train_problem: str
    benchmark_row: int
    benchmark_problem: str


class Report(TypedDict):
    """What was found, ready for JSON."""

    ngram: int
    fraction: float
    train_rows: int
    overlapping_rows: int
    by_benchmark: dict[str, dict[str, int]]  # `rows` are training rows that overlap it
    examples: list[Example]


class Index:
    """The problems of one benchmark, by normalised text and by their n-word sequences, those
    `ignored` aside; those of fewer than n words by how they begin."""

    def __init__(self, problems: Sequence[str], ngram: int, ignored: frozenset[str]) -> None:
        self.ngram, self.ignored = ngram, ignored
        self.exact: dict[str, int] = {}
        self.rows_of: dict[str, list[int]] = {}
        self.sizes: dict[int, int] = {}  # how many sequences, of rows of enough words
        self.short: dict[str, list[str]] = {}
        for row, problem in enumerate(problems):
            text = normalise(problem)
            self.exact.setdefault(text, row)
            mine = sequences(text, ngram) - ignored
            for sequence in mine:
                self.rows_of.setdefault(sequence, []).append(row)
            words = text.split()
            if sum(map(_is_word, words)) < FEWEST_WORDS:
                continue
            self.sizes[row] = len(mine)
            if len(words) < ngram:
                self.short.setdefault(" ".join(words[:FEWEST_WORDS]), []).append(text)

    def match(self, text: str, fraction: float) -> Match | None:
        """The benchmark row that the normalised training problem `text` overlaps most, if any.

        It overlaps a row if it equals it or if at least `fraction` of its distinct n-word sequences
        occur in that row. It overlaps a row of at least FEWEST_WORDS also if it holds that fraction
        of the row's sequences or, if the row is too short to have any, the row itself.
        """
        if text in self.exact:
            return Match(self.exact[text], "exact", 1.0)
        mine = sequences(text, self.ngram) - self.ignored
        shared = Counter(row for sequence in mine for row in self.rows_of.get(sequence, ()))
        of_mine = {row: count / len(mine) for row, count in shared.items()}
        of_theirs = {row: shared[row] / self.sizes[row] for row in shared if row in self.sizes}
        for kind, fractions in (("ngram", of_mine), ("benchmark_ngram", of_theirs)):
            row, most = min(
                fractions.items(), key=lambda item: (-item[1], item[0]), default=(0, -1.0)
            )
            if most >= fraction:
                return Match(row, kind, most)
        held = self._held(text)
        return Match(self.exact[max(held, key=len)], "contains", 1.0) if held else None

    def _held(self, text: str) -> list[str]:
        """The short problems that occur in a text as whole words."""
        if not self.short:
            return []
        begun = (self.short.get(start, ()) for start in sequences(text, FEWEST_WORDS))
        found = {short for shorts in begun for short in shorts if f" {short} " in f" {text} "}
        return sorted(found)


def _is_word(word: str) -> bool:
    return any(map(str.isalnum, word))


def sequences(text: str, ngram: int) -> set[str]:
    """The distinct n-word sequences of a normalised text."""
    words = text.split()
    return {" ".join(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}


def templates(texts: Sequence[str], ngram: int) -> frozenset[str]:
    """The sequences so common among distinct normalised problems that they are a template's.

    Most occur once: counting them by hash first leaves few to be counted by name.
    """
    distinct = set(texts)
    bound = max(TEMPLATE_ROWS, TEMPLATE_FRACTION * len(distinct))
    buckets = array("L", bytes(array("L").itemsize * BUCKETS))
    for text in distinct:
        for sequence in sequences(text, ngram):
            buckets[hash(sequence) % BUCKETS] += 1
    counts = Counter(
        sequence
        for text in distinct
        for sequence in sequences(text, ngram)
        if buckets[hash(sequence) % BUCKETS] >= bound
    )
    return frozenset(sequence for sequence, count in counts.items() if count >= bound)


def find_overlaps(
    problems: Sequence[str], benchmarks: Mapping[str, Sequence[str]], ngram: int, fraction: float
) -> dict[str, dict[int, Match]]:
    """For each benchmark, the training problems (by index) that overlap it."""
    texts = [normalise(problem) for problem in problems]
    ignored = templates(texts, ngram)
    overlaps: dict[str, dict[int, Match]] = {}
    for name, rows in benchmarks.items():
        index = Index(rows, ngram, ignored)
        matches = ((i, index.match(text, fraction)) for i, text in enumerate(texts))
        overlaps[name] = {i: match for i, match in matches if match is not None}
    return overlaps


def report(
    problems: Sequence[str],
    benchmarks: Mapping[str, Sequence[str]],
    overlaps: Mapping[str, Mapping[int, Match]],
    ngram: int,
    fraction: float,
    place: Callable[[int], str | int] = lambda i: i + 1,
) -> Report:
    """Counts and examples of the `overlaps` of `find_overlaps`, ready for JSON.

    `rows` of a benchmark are training rows that overlap it. Rows count from 1; `place` says
    where a training problem (by index) stands instead.
    """
    overlapping = {i for matches in overlaps.values() for i in matches}
    by_benchmark = {
        name: {
            "benchmark_rows": len(benchmarks[name]),
            "rows": len(matches),
            **{kind: sum(match.kind == kind for match in matches.values()) for kind in KINDS},
        }
        for name, matches in overlaps.items()
    }
    examples: list[Example] = [
        {
            "benchmark": name,
            "kind": match.kind,
            "fraction": round(match.fraction, 4),
            "train_row": place(i),
            "train_problem": problems[i],
            "benchmark_row": match.benchmark_row + 1,
            "benchmark_problem": benchmarks[name][match.benchmark_row],
        }
        for name, matches in overlaps.items()
        for i, match in list(matches.items())[:EXAMPLES]
    ]
    return {
        "ngram": ngram,
        "fraction": fraction,
        "train_rows": len(problems),
        "overlapping_rows": len(overlapping),
        "by_benchmark": by_benchmark,
        "examples": examples,
    }
