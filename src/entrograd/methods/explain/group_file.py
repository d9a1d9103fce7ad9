"""The JSON file of one group that `entrograd explain` reads, checked before anything is computed.

It holds `rewards` [G] and, as the method reads them, lists with a number per token: `entropies`
(nats, at least 0), `logprobs`, `old_logprobs`, `ref_logprobs`, `sampling_logprobs` (at most 0),
`token_scores`, `segment_ids` (from 0); `answers`: text, null or "" for none, a number standing for
its shortest text (1.0 is "1"), compared as text; `reward_heads`: {name: [G shares in [0, 1]]}, or a
list of them per completion; `answer_graph` [G, G]: the edge weights between the completions'
answers. Without any token list a completion counts as one token, or as many as `lengths` says.
`max_length` is Dr.GRPO's constant; the longest completion if absent.
"""

from __future__ import annotations

from dataclasses import replace
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


def read_group(path: Path | str) -> dict[str, Any]:
    """The content of a group file: `reward_heads` by name, `answers` as text.

    Raises:
        InputError: names the file, the key and what is allowed there.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object with {', '.join(KEYS)}")
    for key in data:
        if key not in KEYS:
            raise InputError(f"{path}: {key}: unknown key; allowed here: {', '.join(KEYS)}")
    data = {**data, "reward_heads": _name_heads(path, data.get("reward_heads", {}))}
    lists = {key: value for key, value in data.items() if key not in ("reward_heads", "max_length")}
    lists |= {f"reward_heads.{name}": values for name, values in data["reward_heads"].items()}
    for key, value in lists.items():
        if not isinstance(value, list) or not value:
            raise InputError(f"{path}: {key}: expected a list with an entry per completion")
    sizes = {key: len(value) for key, value in lists.items()}
    if not sizes or len(set(sizes.values())) > 1:
        raise InputError(f"{path}: the lists must hold one entry per completion, got {sizes}")
    for key, value in lists.items():
        if key in TOKEN_KEYS:
            _check_tokens(path, key, value)
        elif key == "answers":
            data["answers"] = [_answer(path, place, item) for place, item in enumerate(value)]
        elif key == "answer_graph":
            _check_graph(path, value)
        elif key == "lengths":
            _check_whole(path, key, value, 1, MOST_TOKENS)
        else:
            high = 1 if key.startswith("reward_heads.") else LARGEST
            _check_numbers(path, key, value, 0 if high == 1 else -LARGEST, high)
    if "max_length" in data:
        _check_whole(path, "max_length", [data["max_length"]], 1, MOST_TOKENS)
    _check_lengths(path, lists)
    return data


def _name_heads(path: Path | str, heads: Any) -> dict[str, Any]:
    """{name: [G]} from that or from one list of numbers per completion, named head_0 and on."""
    if isinstance(heads, dict):
        if "reward" in heads:
            raise InputError(
                f"{path}: reward_heads.reward: this name stands for the graded reward among the "
                "weights of `weighted`; give the head another name"
            )
        return heads
    rows = heads if isinstance(heads, list) else [heads]
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
    _check_numbers(path, "answers", [answer])
    return str(int(answer)) if answer == int(answer) else str(answer)


def _check_tokens(path: Path | str, key: str, rows: list[object]) -> None:
    column = TOKEN_KEYS[key]
    low = -LARGEST if column.low is None else column.low
    high = LARGEST if column.high is None else column.high or ROUNDING
    for number, row in enumerate(rows):
        where = f"{key}[{number}]"
        if not isinstance(row, list) or not row:
            raise InputError(f"{path}: {where}: expected a list with a number per token")
        if key == "segment_ids":  # no more segments than tokens
            _check_whole(path, where, row, 0, len(row) - 1)
        else:
            _check_numbers(path, where, row, low, high)


def _check_graph(path: Path | str, rows: list[Any]) -> None:
    """Symmetric, at least 0, nothing on the diagonal: the weights of an undirected graph."""
    for number, row in enumerate(rows):
        where = f"answer_graph[{number}]"
        if not isinstance(row, list) or len(row) != len(rows):
            raise InputError(f"{path}: {where}: expected a list with a number per completion")
        _check_numbers(path, where, row, 0)
        if row[number]:
            raise InputError(f"{path}: {where}[{number}]: expected 0, no edge to itself")
    for number, row in enumerate(rows):
        for place, value in enumerate(row):
            if value != rows[place][number]:
                raise InputError(
                    f"{path}: answer_graph[{number}][{place}] is {value}, [{place}][{number}] "
                    f"{rows[place][number]}; an edge has one weight"
                )


def _check_lengths(path: Path | str, lists: dict[str, list[Any]]) -> None:
    """The token lists agree, and the group fits into memory when padded."""
    sizes = {key: [len(row) for row in lists[key]] for key in TOKEN_KEYS if key in lists}
    if len({tuple(value) for value in sizes.values()}) > 1:
        raise InputError(f"{path}: the token lists differ in length: {sizes}")
    if sizes and "lengths" in lists:
        raise InputError(f"{path}: lengths: the token lists have theirs; drop lengths")
    key, lengths = next(iter(sizes.items()), ("lengths", lists.get("lengths", [1])))
    if len(lengths) * max(lengths) > MOST_TOKENS:
        raise InputError(
            f"{path}: {key}: {len(lengths)} completions of up to {max(lengths)} tokens; at most "
            f"{MOST_TOKENS} fit, each counted as long as the longest"
        )


def _check_numbers(
    path: Path | str,
    key: str,
    values: list[Any],
    low: float = -LARGEST,
    high: float = LARGEST,
) -> None:
    allowed = _range(low, high)
    for place, value in enumerate(values):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high:  # NaN is within no bounds
            raise InputError(
                f"{path}: {key}[{place}]: expected a finite number{allowed} (got {_shown(value)})"
            )


def _check_whole(path: Path | str, key: str, values: list[Any], low: int, high: int) -> None:
    for value in values:
        if type(value) is not int or not low <= value <= high:
            raise InputError(
                f"{path}: {key}: expected a whole number from {low} to {high} (got {_shown(value)})"
            )


def _range(low: float, high: float) -> str:
    if (low, high) == (-LARGEST, LARGEST):
        return f" of size up to {LARGEST:.3g}"
    if low == -LARGEST:
        return f", at most {0 if high == ROUNDING else high:g}"
    return f", at least {low:g}" if high == LARGEST else f" from {low:g} to {high:g}"


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge one"
    return text if len(text) <= 60 else f"{text[:60]}..."
