"""The exceptions users can cause: messages name the file, the row or key, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something outside the code is wrong: a file, a row, a parameter, a missing package.

    Stages and the command line print the message alone and exit with 2; any other exception is
    a defect of this project and keeps its traceback.
    """


class NonFiniteError(InputError):
    """A value of a training step is not a finite number: the weights are as they were before it."""


class Unfinished(Exception):
    """Part of a stage's work is left to other runs: its outputs are not there yet, what it did is
    kept."""


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python had not enough memory: CUDA, the CPU's allocator and oneDNN each
    say so in their own words."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "not create a memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the import of a package that only the extra `name` installs: InputError without it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed: pip install 'entrograd[{name}]'"
        ) from error
