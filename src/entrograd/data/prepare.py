"""Sources to the prompts table: keep or quarantine, deduplicate, split, decontaminate, render."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from entrograd.data import decontaminate
from entrograd.data.deduplicate import deduplicate
from entrograd.data.normalise import normalise, prompt_id
from entrograd.data.params import PrepareParams, Source
from entrograd.data.prompt import render
from entrograd.data.sources import Reject, Row, name_of, place, read, read_problems
from entrograd.data.split import split
from entrograd.errors import InputError
from entrograd.storage.files import write_json
from entrograd.storage.tables import write_table

log = logging.getLogger("entrograd")

HELDOUT = "heldout split"
SPLITS = ("train", "heldout")
COUNTED = (
    "rows",
    "rejected",
    "duplicates",
    "few_shot_examples",
    "overlapping",
    "train",
    "heldout",
)


def prepare(params: PrepareParams, out: Path, rejects: Path, summary: Path) -> str:
    """Write the prompts table, the rejected rows and a summary of both.

    A prompt that equals a few-shot example is removed from either split, a training prompt also
    if it overlaps a benchmark or the held-out split. Rows keep the order of their sources.

    Returns one line on what was written. Raises InputError, with nothing written, if a source
    can't be read, more than `max_reject_fraction` of the rows are rejected, or no training prompt
    is left.
    """
    benchmarks = {
        name: read_problems(path) for name, path in benchmark_names(params.decontaminate.benchmarks)
    }
    rows, turned_away = _read(params.sources)
    total = len(rows) + len(turned_away)
    counts = Counter((row.source, "rows") for row in rows)
    counts.update((reject.source, "rows") for reject in turned_away)
    rows, duplicates, conflicts = deduplicate(rows)
    counts.update((row.source, "duplicates") for row in duplicates)
    del duplicates
    turned_away += conflicts
    counts.update((reject.source, "rejected") for reject in turned_away)
    _check_reject_fraction(turned_away, total, params.max_reject_fraction)

    shown = {normalise(example.problem) for example in params.prompt.examples}
    parts = [_part(row.problem, shown, params.heldout_fraction) for row in rows]
    report = _mark_overlaps(rows, parts, benchmarks, params)
    counts.update((row.source, part) for row, part in zip(rows, parts, strict=True))
    whole: Counter[str] = Counter()
    for (_, what), count in counts.items():
        whole[what] += count
    if not whole["train"]:
        raise InputError(
            f"no training prompts are left of {total} rows ({whole['rejected']} rejected, "
            f"{whole['duplicates']} duplicates, {whole['overlapping']} overlapping, "
            f"{whole['heldout']} held out); give more rows or a lower prepare.heldout_fraction"
        )
    if params.heldout_fraction > 0 and not whole["heldout"]:
        log.warning("no prompt fell into the held-out split; give more rows")

    chosen = ((row, part) for row, part in zip(rows, parts, strict=True) if part in SPLITS)
    write_table(out, (_prompt(row, part, params) for row, part in chosen), "prompts")
    write_table(rejects, map(vars, turned_away), "rejects")
    write_json(summary, _summary(params, counts, turned_away, report))
    return (
        f"{whole['train']} train and {whole['heldout']} heldout prompts of {total} rows; "
        f"{whole['rejected']} rejected, {whole['duplicates']} duplicates, "
        f"{whole['few_shot_examples'] + whole['overlapping']} removed for overlap"
    )


def _read(sources: Sequence[Source]) -> tuple[list[Row], list[Reject]]:
    """The rows of all sources, one source after another, and those turned away."""
    rows: list[Row] = []
    turned_away: list[Reject] = []
    for name, source in _named(sources):
        taken, refused = read(source, name)
        log.info("%s: %d rows, %d rejected", name, len(taken), len(refused))
        rows += taken
        turned_away += refused
    return rows, turned_away


def _part(problem: str, shown: set[str], heldout_fraction: float) -> str:
    """Which of COUNTED a problem belongs to, `shown` being the few-shot examples."""
    if shown and normalise(problem) in shown:
        return "few_shot_examples"
    return split(problem, heldout_fraction)


def benchmark_names(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, path) of benchmark files: the file's stem, numbered if it came before."""
    seen: Counter[str] = Counter()
    for path in paths:
        stem = Path(path).stem
        seen[stem] += 1
        yield (stem if seen[stem] == 1 else f"{stem}#{seen[stem]}"), path


def _named(sources: Sequence[Source]) -> Iterator[tuple[str, Source]]:
    seen: Counter[str] = Counter()
    for source in sources:
        name = name_of(source)
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), source


def _check_reject_fraction(rejects: Sequence[Reject], total: int, bound: float) -> None:
    if len(rejects) <= bound * total:
        return
    reasons = Counter(reject.reason for reject in rejects).most_common(3)
    examples = []
    for reason, count in reasons:
        first = next(reject for reject in rejects if reject.reason == reason)
        examples.append(f"{reason} ({count}; {place(first)}: {first.content[:120]!r})")
    raise InputError(
        f"{len(rejects)} of {total} rows are rejected, above prepare.max_reject_fraction "
        f"{bound:g}: {'; '.join(examples)}; fix the rows or raise the fraction"
    )


def _mark_overlaps(
    rows: Sequence[Row],
    parts: list[str],
    benchmarks: dict[str, list[str]],
    params: PrepareParams,
) -> decontaminate.Report:
    """Make `overlapping` the part of the training rows that overlap a benchmark or the held-out
    split; the report on them."""
    train = [i for i, part in enumerate(parts) if part == "train"]
    heldout = [row.problem for row, part in zip(rows, parts, strict=True) if part == "heldout"]
    against = {**benchmarks, HELDOUT: heldout}
    problems = [rows[i].problem for i in train]
    bounds = params.decontaminate.ngram, params.decontaminate.fraction
    overlaps = decontaminate.find_overlaps(problems, against, *bounds)
    for matches in overlaps.values():
        for i in matches:
            parts[train[i]] = "overlapping"
    return decontaminate.report(
        problems, against, overlaps, *bounds, lambda i: place(rows[train[i]])
    )


def _prompt(row: Row, part: str, params: PrepareParams) -> dict[str, object]:
    return {
        "prompt_id": prompt_id(row.problem, row.answers),
        "source": row.source,
        "split": part,
        "problem": row.problem,
        "answers": list(row.answers),
        "level": row.level,
        **render(row.problem, params.prompt),
    }


def _summary(
    params: PrepareParams,
    counts: Counter[tuple[str, str]],
    rejects: Sequence[Reject],
    report: decontaminate.Report,
) -> dict[str, object]:
    names = [name for name, _ in _named(params.sources)]
    return {
        "sources": {name: {key: counts[name, key] for key in COUNTED} for name in names},
        "total": {key: sum(counts[name, key] for name in names) for key in COUNTED},
        "reject_reasons": dict(Counter(reject.reason for reject in rejects)),
        "overlap": report,
    }
