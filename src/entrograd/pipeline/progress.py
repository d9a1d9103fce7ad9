"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines
elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger("entrograd")

LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts `unit`s of work towards `total`. `what` is the title of the bar; lines begin with the
    stage's name as it is, like all it logs."""

    def __init__(
        self, total: int, unit: str, what: str, stream: TextIO | None = None, done: int = 0
    ) -> None:
        self.total, self.unit = total, unit
        self.done = self._before = done
        stream = stream or sys.stderr
        self._start = self._last = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, unit=unit, desc=what, file=stream)
            if stream.isatty()
            else None
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown beside them (a loss, an accuracy)."""
        self.done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_SECONDS or self.done == self.total:
            self._last = now
            log.info("%s", self._line(now - self._start, note))

    def _line(self, seconds: float, note: str) -> str:
        rate = (self.done - self._before) / seconds if seconds > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        line = f"{self.done}/{self.total} {self.unit}, {rate:.2f}/s, {left:.0f} s left"
        return f"{line}, {note}" if note else line

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress(total: int, unit: str, what: str, done: int = 0) -> Iterator[Progress]:
    """A Progress that is closed at the end, whatever happens; `done` units were done before."""
    bar = Progress(total, unit, what, done=done)
    try:
        yield bar
    finally:
        bar.close()
