"""Where a key of params.yaml stands: the section `execution`, and keys that have another name now.

`execution` holds, by section, what changes no result: how wide, on what device, in how much memory,
with which server. No stage's parameters in DVC include it, and unfinished work is not keyed by it.
Results are equal to the bit, but for `token_budget` and `device`, on which the rounding of sums
depends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from pydantic import BaseModel

from entrograd.errors import InputError
from entrograd.params import SECTIONS, execution_keys

# Old key -> its name now; * is any one key.
RENAMED = {
    "prepare.overlap": "prepare.decontaminate",
    "prepare.decontaminate.share": "prepare.decontaminate.fraction",
    "method.high_entropy_tokens.share": "method.high_entropy_tokens.fraction",
    "prepare.heldout_share": "prepare.heldout_fraction",
    "prepare.max_reject_share": "prepare.max_reject_fraction",
    "rollout.vllm.max_gap": "rollout.vllm.max_mismatch",
    "method.*.correction": "method.*.importance_sampling",
    "method.*.correction_level": "method.*.importance_sampling_level",
    "method.*.correction_cap": "method.*.importance_sampling_cap",
    "train_offline.groups_per_step": "train_offline.prompts_per_update",
    "train_online.steps": "train_online.rounds",
    "train_online.prompts_per_step": "train_online.prompts_per_round",
    "train_online.updates_per_round": "train_online.epochs_per_round",
    "train_online.overlap": "train_online.prefetch",
    "train_online.gap": "train_online.mismatch",
    "train_online.mismatch.correction": "train_online.mismatch.importance_sampling",
    "train_online.mismatch.correction_level": "train_online.mismatch.importance_sampling_level",
    "train_online.mismatch.correction_cap": "train_online.mismatch.importance_sampling_cap",
    "evaluate.bootstrap": "score.bootstrap",
    "evaluate.confidence": "score.confidence",
    "*.checkpoint.every_steps": "*.checkpoint.every_updates",
    "*.checkpoint.max_share": "execution.*.checkpoint.max_fraction",
    "*.optimizer.warmup_steps": "*.optimizer.warmup_updates",
}


def check_names(data: Mapping[str, object]) -> None:
    """InputError, without the file, where a key has another name now."""
    for path in _paths(data):
        for old, new in RENAMED.items():
            if len(path) == old.count(".") + 1 and fnmatchcase(".".join(path), old):
                parts = zip(path, old.split("."), strict=True)
                now = new.replace("*", next((part for part, name in parts if name == "*"), "*"))
                raise InputError(f"{'.'.join(path)}: is called {now} now")


def merged(name: str, model: type[BaseModel], data: Mapping[str, object]) -> object:
    """Section `name` of `data` with the keys that section `execution` holds for it.

    InputError, without the file, where a key stands in the wrong one of the two.
    """
    block, further = data.get(name), _execution(data).get(name) or {}
    allowed = execution_keys(model)
    if isinstance(block, Mapping):
        for path in _paths(block):
            if path in allowed:
                key = ".".join((name, *path))
                raise InputError(f"{key}: changes no result; write it as execution.{key}")
    if not further:
        return block
    if not isinstance(further, Mapping):
        raise InputError(f"execution.{name}: expected keys and values (got {further!r})")
    for path, value in _items(further):
        inner = any(key[: len(path)] == path for key in allowed) and isinstance(value, Mapping)
        if not inner and not any(path[: len(key)] == key for key in allowed):
            known = ", ".join(".".join(key) for key in allowed) or "nothing"
            raise InputError(
                f"execution.{name}.{'.'.join(path)}: unknown key; allowed here: {known} "
                f"(what changes results belongs into section {name})"
            )
    return _united(block or {}, further)


def check_execution(data: Mapping[str, object]) -> None:
    """InputError, without the file, where `execution` is none, or names no section."""
    for name in _execution(data):
        if name not in SECTIONS:
            raise InputError(f"execution.{name}: no section; allowed here: {', '.join(SECTIONS)}")


def _execution(data: Mapping[str, object]) -> Mapping[str, object]:
    block = data.get("execution") or {}
    if not isinstance(block, Mapping):
        raise InputError(f"execution: expected sections ({', '.join(SECTIONS)}) (got {block!r})")
    return block


def _united(block: object, further: Mapping[str, object]) -> object:
    if not isinstance(block, Mapping):
        return block
    both = dict(block)
    for key, value in further.items():
        old = block.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = _united(old, value)
        both[key] = value
    return both


def _items(data: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every key of nested blocks as a path, with its value."""
    for key, value in data.items():
        yield (str(key),), value
        if isinstance(value, Mapping):
            yield from (((str(key), *path), inner) for path, inner in _items(value))


def _paths(data: Mapping[str, object]) -> Iterator[tuple[str, ...]]:
    return (path for path, _ in _items(data))
