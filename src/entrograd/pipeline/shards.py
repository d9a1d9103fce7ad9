"""Shards in parallel: one piece of work over shard numbers, here, in processes, or through Ray.

What a shard gives depends on the shard alone, never on where it ran: workers compute with as many
threads as the caller would. The caller writes the results; workers only read, so that of a worker
that dies nothing is left, and its shard is done again by another.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.util
import os
import re
import secrets
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from entrograd.errors import InputError
from entrograd.pipeline.params import Executor
from entrograd.pipeline.parent import end_with_parent

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

log = logging.getLogger("entrograd")

Result = TypeVar("Result")

# What opens a worker: arguments -> a context whose value maps a shard's number to its result. A
# function of a module, since other processes import it; arguments and results are pickled.
OpenWorker = Callable[..., AbstractContextManager[Callable[[int], Result]]]

DEATHS = 3  # of workers on one shard before the run gives up
CONNECT_SECONDS = 5.0


def map_shards(
    executor: Executor,
    open_worker: OpenWorker[Result],
    arguments: tuple[object, ...],
    shards: Sequence[int],
) -> Iterator[tuple[int, Result]]:
    """(shard, its result) of every shard, as they are finished.

    Raises:
        InputError: a Ray cluster that is not there; a shard at which workers die again and again.
            Exceptions of the work itself are raised as they are.
    """
    if not shards:
        return
    if executor.kind == "inline":
        with open_worker(*arguments) as work:
            for shard in shards:
                yield shard, work(shard)
    elif executor.kind == "processes":
        yield from _processes(executor, open_worker, arguments, shards)
    else:
        yield from _ray(executor, open_worker, arguments, shards)


def chosen_shards(text: str | None, count: int) -> list[int]:
    """The shard numbers in a text such as `3-5,8`; all `count` of them where it is None."""
    if text is None:
        return list(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < count:
            raise InputError(
                f"--shards {text}: expected numbers or ranges from 0 to {count - 1}, as in 0-2,5"
            )
        chosen |= set(range(first, last + 1))
    return sorted(chosen)


# --- one machine -----------------------------------------------------------------------------

_opened: Callable[[int], Any] | None = None  # the worker of this process, once a shard asked for it


def _processes(
    executor: Executor,
    open_worker: OpenWorker[Result],
    arguments: tuple[object, ...],
    shards: Sequence[int],
) -> Iterator[tuple[int, Result]]:
    waiting, deaths = list(shards), Counter[int]()
    while waiting:
        context = multiprocessing.get_context("spawn")
        count = min(executor.workers, len(waiting))
        pool = ProcessPoolExecutor(
            count, context, _process_started, (_threads(), context.Value("i", 0))
        )
        running: dict[Future[Result], int] = {}
        try:
            todo = deque(waiting)
            while todo or running:
                while todo and len(running) < count:
                    shard = todo.popleft()
                    running[pool.submit(_in_process, open_worker, arguments, shard)] = shard
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = future.result()
                    shard = running.pop(future)
                    waiting.remove(shard)
                    yield shard, result
        except BrokenProcessPool:
            for shard in {running[f] for f in running if not f.done() or f.exception()}:
                _count_death(deaths, shard)
            for future, shard in running.items():
                if future.done() and not future.exception():
                    waiting.remove(shard)
                    yield shard, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _process_started(threads: int, counter: Synchronized[int]) -> None:
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _in_process(
    open_worker: OpenWorker[Result], arguments: tuple[object, ...], shard: int
) -> Result:
    global _opened
    if _opened is None:
        stack = ExitStack()
        _opened = stack.enter_context(open_worker(*arguments))
        multiprocessing.util.Finalize(None, stack.close, exitpriority=10)
    result: Result = _opened(shard)
    return result


# --- many machines ---------------------------------------------------------------------------


class _RayWorker(Generic[Result]):
    """An actor: opens its worker at the first shard, in the folder `folder`."""

    def __init__(
        self,
        open_worker: OpenWorker[Result],
        arguments: tuple[object, ...],
        threads: int,
        folder: Path,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.folder = folder
        self.open_worker, self.arguments = open_worker, arguments
        self.stack = ExitStack()
        self.work: Callable[[int], Result] | None = None

    def run(self, shard: int) -> Result:
        if self.work is None:
            if not self.folder.is_dir():
                raise InputError(
                    f"executor ray: {socket.gethostname()} has no folder {self.folder}; mount the "
                    "inputs there, at the same path as here"
                )
            os.chdir(self.folder)  # relative paths, and modules beside params.yaml
            self.work = self.stack.enter_context(self.open_worker(*self.arguments))
        return self.work(shard)

    def process(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self.stack.close()


def _ray(
    executor: Executor,
    open_worker: OpenWorker[Result],
    arguments: tuple[object, ...],
    shards: Sequence[int],
) -> Iterator[tuple[int, Result]]:
    with _cluster(executor) as ray:
        remote = ray.remote(num_cpus=executor.cpus, num_gpus=executor.gpus)(_RayWorker)
        waiting, deaths, folder = deque(shards), Counter[int](), Path.cwd()
        idle: deque[Any] = deque()
        running: dict[Any, tuple[int, Any]] = {}
        started = 0
        while waiting or running:
            while waiting and len(running) < executor.workers:
                if not idle:
                    idle.append(remote.remote(open_worker, arguments, _threads(), folder))
                    started += 1
                worker, shard = idle.popleft(), waiting.popleft()
                running[worker.run.remote(shard)] = shard, worker
            finished, _ = ray.wait(list(running))
            for reference in finished:
                shard, worker = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayActorError as error:
                    _count_death(deaths, shard, str(error))
                    waiting.appendleft(shard)
                else:
                    idle.append(worker)
                    yield shard, result
        ray.get([worker.close.remote() for worker in idle])


@contextmanager
def _cluster(executor: Executor) -> Iterator[ModuleType]:
    """Ray, connected to the cluster at executor.address or to one of its own on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if executor.address is None:  # Ray listens on all interfaces: nobody else may give it work
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise InputError(
            "executor ray: Ray is not installed; pip install 'entrograd[ray]', or take executor "
            "processes"
        ) from None
    address = executor.address
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=max(1, executor.workers * executor.cpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=256 << 20,
            )
        else:
            _check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare ones, too, where it cannot start or connect
        raise InputError(
            f"executor ray: no cluster at {address or 'this machine'}: {error}; start one there "
            "(ray start --head), or leave address out for one of this run's own"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """OSError where nothing listens at host:port: Ray itself tries for minutes."""
    found = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if found:
        socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()


def _count_death(deaths: Counter[int], shard: int, why: str = "") -> None:
    deaths[shard] += 1
    if deaths[shard] >= DEATHS:
        raise InputError(
            f"shard {shard}: {DEATHS} workers died at it, most likely out of memory; lower "
            f"token_budget or the number of workers {why[:600]}".rstrip()
        )
    log.warning("a worker died at shard %d: it is done again", shard)


def _threads() -> int:
    import torch

    return torch.get_num_threads()
