"""The JSON file of one group that `entrograd explain` reads, checked before anything is computed.

It holds `rewards` [G] and, as the method reads them, lists with a number per token: `entropies`
(nats, at least 0), `logprobs`, `old_logprobs`, `ref_logprobs`, `sampling_logprobs` (at most 0),
`token_scores`, `segment_ids` (from 0); `answers`: text, null or "" for none, a number standing for
its shortest text (1.0 is "1"), compared as text; `reward_heads`: {name: [G numbers in [0, 1]]}, or
a list of them per completion; `answer_graph` [G, G]: the edge weights between the completions'
answers. Without any token list a completion counts as one token, or as many as `lengths` says.
`max_length` is Dr.GRPO's constant; the longest completion if absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from entrograd.errors import InputError
from entrograd.storage.columns import REF_LOGPROBS, TOKEN_COLUMNS
from entrograd.storage.files import read_json

LOGPROBS = replace(REF_LOGPROBS, name="logprobs", batch="logprobs")  # of the current policy
TOKEN_KEYS = {LOGPROBS.name: LOGPROBS, **{c.batch: c for c in TOKEN_COLUMNS.values() if c.batch}}
COMPLETION_KEYS = ("rewards", "answers", "answer_graph", "lengths")  # an entry per completion
KEYS = (*COMPLETION_KEYS, "reward_heads", "max_length", *TOKEN_KEYS)

LARGEST = torch.finfo(torch.float32).max  # training holds every number in float32
ROUNDING = 1e-5  # what a logprob may be above 0: a logit less a sum of exponentials in float32
MOST_TOKENS = 2**24  # of a group, padded: half a gigabyte in the few columns that are computed


@dataclass
class Group:
    """A group file's content, checked; None or {} for what it lacks."""

    size: int  # completions
    tokens: dict[str, list[list[float]]] = field(default_factory=dict)  # by key, ragged
    rewards: list[float] | None = None
    answers: list[str | None] | None = None
    answer_graph: list[list[float]] | None = None
    lengths: list[int] | None = None
    reward_heads: dict[str, list[float]] = field(default_factory=dict)
    max_length: int | None = None


def read_group(path: Path | str) -> Group:
    """The content of a group file.

    Raises:
        InputError: names the file, the key and what is allowed there.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object with {', '.join(KEYS)}")
    for key in data:
        if key not in KEYS:
            raise InputError(f"{path}: {key}: unknown key; allowed here: {', '.join(KEYS)}")
    heads = _name_heads(path, data.get("reward_heads", {}))
    lists = {key: value for key, value in data.items() if key not in ("reward_heads", "max_length")}
    lists |= {f"reward_heads.{name}": values for name, values in heads.items()}
    entries: dict[str, list[object]] = {}
    for key, value in lists.items():
        if not isinstance(value, list) or not value:
            raise InputError(f"{path}: {key}: expected a list with an entry per completion")
        entries[key] = value
    sizes = {key: len(value) for key, value in entries.items()}
    if not sizes or len(set(sizes.values())) > 1:
        raise InputError(f"{path}: the lists must hold one entry per completion, got {sizes}")
    group = Group(next(iter(sizes.values())))
    for key, values in entries.items():
        if key in TOKEN_KEYS:
            group.tokens[key] = _tokens(path, key, values)
        elif key == "rewards":
            group.rewards = _numbers(path, key, values)
        elif key == "answers":
            group.answers = [_answer(path, place, item) for place, item in enumerate(values)]
        elif key == "answer_graph":
            group.answer_graph = _graph(path, values)
        elif key == "lengths":
            group.lengths = _whole(path, key, values, 1, MOST_TOKENS)
        else:
            name = key.removeprefix("reward_heads.")
            group.reward_heads[name] = _numbers(path, key, values, 0, 1)
    if "max_length" in data:
        (group.max_length,) = _whole(path, "max_length", [data["max_length"]], 1, MOST_TOKENS)
    _check_lengths(path, group)
    return group


def _name_heads(path: Path | str, heads: object) -> Mapping[str, object]:
    """{name: [G]} from that or from one list of numbers per completion, named head_0 and on."""
    if isinstance(heads, dict):
        if "reward" in heads:
            raise InputError(
                f"{path}: reward_heads.reward: this name stands for the graded reward among the "
                "weights of `weighted`; give the head another name"
            )
        return heads
    rows: list[Any] = heads if isinstance(heads, list) else [heads]
    if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise InputError(
            f"{path}: reward_heads: expected {{name: [a number per completion]}} or lists of one "
            "length, one per completion"
        )
    return {f"head_{k}": list(column) for k, column in enumerate(zip(*rows, strict=True))}


def _answer(path: Path | str, place: int, answer: object) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise InputError(
            f"{path}: answers: expected text, or null if there is none (entry {place} is "
            f"{_shown(answer)})"
        )
    _numbers(path, "answers", [answer])
    return str(int(answer)) if answer == int(answer) else str(answer)


def _tokens(path: Path | str, key: str, rows: Sequence[object]) -> list[list[float]]:
    column = TOKEN_KEYS[key]
    low = -LARGEST if column.low is None else column.low
    high = LARGEST if column.high is None else column.high or ROUNDING
    checked: list[list[float]] = []
    for number, row in enumerate(rows):
        where = f"{key}[{number}]"
        if not isinstance(row, list) or not row:
            raise InputError(f"{path}: {where}: expected a list with a number per token")
        if key == "segment_ids":  # no more segments than tokens
            checked.append([*_whole(path, where, row, 0, len(row) - 1)])
        else:
            checked.append(_numbers(path, where, row, low, high))
    return checked


def _graph(path: Path | str, rows: Sequence[object]) -> list[list[float]]:
    """Symmetric, at least 0, nothing on the diagonal: the weights of an undirected graph."""
    graph: list[list[float]] = []
    for number, row in enumerate(rows):
        where = f"answer_graph[{number}]"
        if not isinstance(row, list) or len(row) != len(rows):
            raise InputError(f"{path}: {where}: expected a list with a number per completion")
        graph.append(_numbers(path, where, row, 0))
        if row[number]:
            raise InputError(f"{path}: {where}[{number}]: expected 0, no edge to itself")
    for number, weights in enumerate(graph):
        for place, value in enumerate(weights):
            if value != graph[place][number]:
                raise InputError(
                    f"{path}: answer_graph[{number}][{place}] is {value}, [{place}][{number}] "
                    f"{graph[place][number]}; an edge has one weight"
                )
    return graph


def _check_lengths(path: Path | str, group: Group) -> None:
    """The token lists agree, and the group fits into memory when padded."""
    sizes = {
        key: [len(row) for row in group.tokens[key]] for key in TOKEN_KEYS if key in group.tokens
    }
    if len({tuple(value) for value in sizes.values()}) > 1:
        raise InputError(f"{path}: the token lists differ in length: {sizes}")
    if sizes and group.lengths is not None:
        raise InputError(f"{path}: lengths: the token lists have theirs; drop lengths")
    key, lengths = next(iter(sizes.items()), ("lengths", group.lengths or [1]))
    if len(lengths) * max(lengths) > MOST_TOKENS:
        raise InputError(
            f"{path}: {key}: {len(lengths)} completions of up to {max(lengths)} tokens; at most "
            f"{MOST_TOKENS} fit, each counted as long as the longest"
        )


def _numbers(
    path: Path | str,
    key: str,
    values: Sequence[object],
    low: float = -LARGEST,
    high: float = LARGEST,
) -> list[float]:
    checked: list[float] = []
    for place, value in enumerate(values):
        # NaN is within no bounds
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            raise InputError(
                f"{path}: {key}[{place}]: expected a finite number{_range(low, high)} "
                f"(got {_shown(value)})"
            )
        checked.append(value)
    return checked


def _whole(path: Path | str, key: str, values: Sequence[object], low: int, high: int) -> list[int]:
    checked: list[int] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(
                f"{path}: {key}: expected a whole number from {low} to {high} (got {_shown(value)})"
            )
        checked.append(value)
    return checked


def _range(low: float, high: float) -> str:
    if (low, high) == (-LARGEST, LARGEST):
        return f" of size up to {LARGEST:.3g}"
    if low == -LARGEST:
        return f", at most {0 if high == ROUNDING else high:g}"
    return f", at least {low:g}" if high == LARGEST else f" from {low:g} to {high:g}"


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge one"
    return text if len(text) <= 60 else f"{text[:60]}..."
