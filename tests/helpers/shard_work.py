"""The work that test_shards gives to other processes; they import this module alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from entrograd.errors import InputError


@contextmanager
def worker(folder: Path, fatal: int, times: int) -> Iterator[Callable[[int], list[int]]]:
    """Works on the numbers; its process dies at shard `fatal`, `times` times in all."""
    import torch

    def work(shard: int) -> list[int]:
        if shard == fatal:
            before = len(list(folder.iterdir()))
            if before < times:
                (folder / str(before)).touch()
                os._exit(1)
        if shard == 99:
            raise InputError("prompt p99: it has no tokens; give it a text")
        return [shard, shard * shard, torch.get_num_threads()]

    yield work


def dying_rollout(*arguments: Any) -> AbstractContextManager[Callable[[int], Any]]:
    """The worker of stage rollout; the first process to come to shard 1 dies there."""
    from entrograd.rollout.rollout import shard_worker

    return _dying(shard_worker(*arguments))


def dying_annotate(*arguments: Any) -> AbstractContextManager[Callable[[int], Any]]:
    """The worker of stage annotate; the same."""
    from entrograd.annotate.annotate import shard_worker

    return _dying(shard_worker(*arguments))


@contextmanager
def _dying(
    shard_worker: AbstractContextManager[Callable[[int], Any]],
) -> Iterator[Callable[[int], Any]]:
    mark = Path(os.environ["ENTROGRAD_TEST_MARK"])
    with shard_worker as inner:

        def work(shard: int) -> Any:
            if shard == 1 and not mark.exists():
                mark.touch()
                os._exit(1)
            return inner(shard)

        yield work
