"""Training problems that overlap an evaluation's: equal after normalisation, or sharing long
sequences of words, after the n-gram overlap of GPT-3 (arXiv 2005.14165v4, appendix C)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entrograd.data.normalise import normalise

# A sequence in more than this share of the training problems, and in at least this many of them,
# is the wording of a template ("State the final answer to ..."), not of a problem.
TEMPLATE_SHARE = 0.05
TEMPLATE_ROWS = 20
EXAMPLES = 5


@dataclass(frozen=True)
class Match:
    """What a training problem was found to overlap."""

    benchmark_row: int  # index into the benchmark's problems
    kind: str  # exact | ngram
    share: float  # of the training problem's sequences found in that row


class Index:
    """The problems of one benchmark, by normalised text and by their n-word sequences."""

    def __init__(self, problems: Sequence[str], ngram: int) -> None:
        self.ngram = ngram
        self.exact: dict[str, int] = {}
        self.rows_of: dict[str, list[int]] = {}
        for row, problem in enumerate(problems):
            text = normalise(problem)
            self.exact.setdefault(text, row)
            for sequence in sequences(text, ngram):
                self.rows_of.setdefault(sequence, []).append(row)

    def match(self, text: str, share: float, ignored: frozenset[str]) -> Match | None:
        """The benchmark row that the normalised training problem `text` overlaps most, if any.

        It overlaps a row where it equals it, or where at least `share` of its distinct n-word
        sequences (those `ignored` aside) stand in that row. Problems of fewer than n words can
        only be equal.
        """
        if text in self.exact:
            return Match(self.exact[text], "exact", 1.0)
        mine = sequences(text, self.ngram) - ignored
        found = Counter(row for sequence in mine for row in self.rows_of.get(sequence, ()))
        if not found:
            return None
        row, count = min(found.items(), key=lambda item: (-item[1], item[0]))
        return Match(row, "ngram", count / len(mine)) if count >= share * len(mine) else None


def sequences(text: str, ngram: int) -> set[str]:
    """The distinct n-word sequences of a normalised text."""
    words = text.split()
    return {" ".join(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}


def templates(texts: Sequence[str], ngram: int) -> frozenset[str]:
    """The sequences so common among distinct normalised problems that they are a template's."""
    distinct = set(texts)
    counts = Counter(sequence for text in distinct for sequence in sequences(text, ngram))
    bound = max(TEMPLATE_ROWS, TEMPLATE_SHARE * len(distinct))
    return frozenset(sequence for sequence, count in counts.items() if count >= bound)


def find_overlaps(
    problems: Sequence[str], benchmarks: Mapping[str, Sequence[str]], ngram: int, share: float
) -> dict[str, dict[int, Match]]:
    """For each benchmark, the training problems (by index) that overlap it."""
    texts = [normalise(problem) for problem in problems]
    ignored = templates(texts, ngram)
    found: dict[str, dict[int, Match]] = {}
    for name, rows in benchmarks.items():
        index = Index(rows, ngram)
        matches = ((i, index.match(text, share, ignored)) for i, text in enumerate(texts))
        found[name] = {i: match for i, match in matches if match is not None}
    return found


def report(
    problems: Sequence[str],
    benchmarks: Mapping[str, Sequence[str]],
    found: Mapping[str, Mapping[int, Match]],
    ngram: int,
    share: float,
    places: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Counts and examples of what `find_overlaps` found, ready for JSON.

    `rows` of a benchmark are training rows that overlap it. Rows count from 1; `places` says
    where the training problems stand instead.
    """
    overlapping = {i for matches in found.values() for i in matches}
    by_benchmark = {
        name: {
            "benchmark_rows": len(benchmarks[name]),
            "rows": len(matches),
            "exact": sum(match.kind == "exact" for match in matches.values()),
            "ngram": sum(match.kind == "ngram" for match in matches.values()),
        }
        for name, matches in found.items()
    }
    examples = [
        {
            "benchmark": name,
            "kind": match.kind,
            "share": round(match.share, 4),
            "train_row": places[i] if places else i + 1,
            "train_problem": problems[i],
            "benchmark_row": match.benchmark_row + 1,
            "benchmark_problem": benchmarks[name][match.benchmark_row],
        }
        for name, matches in found.items()
        for i, match in list(matches.items())[:EXAMPLES]
    ]
    return {
        "ngram": ngram,
        "share": share,
        "train_rows": len(problems),
        "overlapping_rows": len(overlapping),
        "by_benchmark": by_benchmark,
        "examples": examples,
    }
