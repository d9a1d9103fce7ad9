"""Progress: lines where no terminal is, under the stage's name."""

from __future__ import annotations

import io
import logging

import pytest

from entrograd.pipeline.progress import Progress


def test_a_line_does_not_repeat_the_name_that_logs_begin_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bar = Progress(32, "completions", "rollout", io.StringIO())
    with caplog.at_level(logging.INFO, "entrograd"):
        bar.advance(31)
        bar.advance(1, "reward 0.500")
    (line,) = caplog.messages
    assert line.startswith("32/32 completions, ")
    assert line.endswith("/s, 0 s left, reward 0.500")
