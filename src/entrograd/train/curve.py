"""What a training run measures, in files that grow row by row, so that a run can be watched."""

from __future__ import annotations

import csv
import io
import logging
import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from entrograd.environment import peak_mib
from entrograd.storage.files import append_text, write_csv
from entrograd.storage.metrics import OF_BATCH, ordered

log = logging.getLogger("entrograd")

Row = dict[str, float]
COUNTS = ("round", "update", "tokens")  # columns of a speed file that hold whole numbers


class Curve:
    """A run's rows of metrics, one per update, and `path`, a CSV file of them that is whole after
    every row. A new column makes the file anew, with the columns in the order of the registry.

    `rows` is not copied: a checkpoint holds the same list, and a run that is continued begins with
    those of its checkpoint; whatever else the file had is gone. KeyError for a name that is no
    metric. Without `writes` (a process beside the first) there is no file.
    """

    def __init__(self, path: Path, rows: list[Row], *, writes: bool = True) -> None:
        self.path, self.rows, self._writes = path, rows, writes
        self._columns = ordered(name for row in rows for name in row)
        if writes:
            path.unlink(missing_ok=True)
            if rows:
                self.write(path)

    def add(self, row: Row) -> None:
        """One more row. InputError where the file cannot be written."""
        self.rows.append(row)
        columns, self._columns = self._columns, ordered([*self._columns, *row])
        if self._columns != columns:
            self.write(self.path)
        elif self._writes:
            line = io.StringIO()
            csv.DictWriter(line, columns, lineterminator="\n").writerow(row)
            append_text(self.path, line.getvalue())

    def write(self, path: Path) -> None:
        """All rows at `path`, whole or not at all."""
        if self._writes:
            write_csv(path, self.rows, self._columns)

    def newest(self, name: str) -> float:
        """The last value of a metric; NaN if there is none."""
        return next((row[name] for row in reversed(self.rows) if name in row), math.nan)

    def ends(self, name: str) -> tuple[float, float]:
        """The means of a metric over the first and the last tenth of its values; NaN if there is
        none."""
        values = [row[name] for row in self.rows if name in row]
        count = max(1, len(values) // 10)
        parts = values[:count], values[-count:]
        first, last = (statistics.fmean(part) if part else math.nan for part in parts)
        return first, last


def online_row(
    number: int, update: int, epoch: int, drawn: Mapping[str, float], trained: Mapping[str, float]
) -> Row:
    """A row of the online curve.

    Args:
        number: of the round; it, `update` and `epoch` count from 1.
        epoch: the pass over the round.
        drawn: the metrics of the round: only its first update's row has them.
        trained: those of the update. What has the name of one of the round's gets `batch_` before
            it: with dynamic sampling a batch holds some of the groups that were drawn.
    """
    batch = {OF_BATCH.get(name, name): value for name, value in trained.items()}
    return {"round": number, "update": update, "epoch": epoch, **drawn, **batch}


def record(
    resume: Path, rows: list[Row], done: int, *, writes: bool = True
) -> tuple[Curve, Stopwatch]:
    """The files that a run's metrics and seconds grow in, in its folder of unfinished work; `rows`
    and what was measured up to update `done` stay."""
    curve = Curve(resume / "curve.csv", rows, writes=writes)
    log.info("curve: %s", curve.path)
    return curve, Stopwatch(resume, done, writes=writes)


class Stopwatch:
    """Seconds a run spends in each phase, one row per update, in `speed.csv` of the unfinished work
    in `resume`. Of a run that is continued after update `done` the rows up to there stay.

    Phases: sample, annotate, evaluate, update, checkpoint. They may run in several threads.
    """

    def __init__(self, resume: Path, done: int, *, writes: bool = True) -> None:
        path = resume / "speed.csv"
        self._rows = Curve(path, _rows_until(path, done) if writes else [], writes=writes)
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._last = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block's seconds are added to those of phase `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._spent[f"seconds_{name}"] += time.monotonic() - start

    def lap(self, tokens: int, **place: int) -> None:
        """An update on `tokens` completion tokens is done: write its row. `place`: its number, by
        `update`, and what else says which it is."""
        now = time.monotonic()
        with self._lock:
            spent, self._spent = self._spent, defaultdict(float)
        seconds, self._last = now - self._last, now
        self._rows.add(
            {
                **place,
                **{name: round(value, 4) for name, value in spent.items()},
                "seconds": round(seconds, 4),
                "tokens": tokens,
                "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
                "peak_memory": round(peak_memory(), 1),
            }
        )

    def write(self, curve: Path) -> None:
        """Put the rows beside the file `curve`: speed of `results/train_online.csv` is
        `results/train_online.speed.csv`."""
        self._rows.write(curve.with_suffix(".speed.csv"))


def peak_memory() -> float:
    """MiB: the most this process has had of its GPU, or without one of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib()


def _rows_until(path: Path, done: int) -> list[Row]:
    """The rows of a speed file up to update `done`; a line that was cut off is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return [
        {name: int(text) if name in COUNTS else float(text) for name, text in row.items() if text}
        for row in rows
        if int(row["update"]) <= done
    ]
