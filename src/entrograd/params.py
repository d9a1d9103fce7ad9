"""What every section of params.yaml is made of: closed, strict models whose errors name the key and
what is allowed. Each package holds the model of its own section (`PACKAGE/params.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from entrograd.errors import InputError

# The sections, in the pipeline's order.
SECTIONS = (
    *("base_model", "prepare", "rollout", "annotate", "method"),
    *("train_offline", "train_online", "evaluate", "score", "report"),
)

# Marks a key that changes no result (or its rounding alone): params.yaml has it in section
# `execution`, which no stage's parameters in DVC include, and unfinished work is not keyed by it.
Execution = Field(exclude=True)


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("allowed: auto, cpu, cuda, or cuda:N for the GPU of that number")
    return name


DType = Literal["auto", "float32", "bfloat16"]
Device = Annotated[str, AfterValidator(_device)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A block of params.yaml: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def files(self) -> list[str]:
        """The files and folders of the user's own that this block names, in order: inputs of its
        stage though they are no arguments of it."""
        return [file for name in type(self).model_fields for file in _files(getattr(self, name))]


def _files(value: object) -> list[str]:
    if isinstance(value, Section):
        return value.files()
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return [file for item in items for file in _files(item)]
    return []


def execution_keys(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """The keys within `model` that are marked as Execution, as paths."""
    paths: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        if field.exclude:
            paths.append((name,))
        else:
            inner = [key for block in models_in(field.annotation) for key in execution_keys(block)]
            paths += [(name, *path) for path in dict.fromkeys(inner)]
    return paths


def execution(section: Section) -> dict[str, object]:
    """The values of the keys within `section` that are marked as Execution, by dotted key."""
    values: dict[str, object] = {}
    for path in execution_keys(type(section)):
        value: object = section
        for name in path:
            value = getattr(value, name, None)
        if value is not None:
            values[".".join(path)] = value.model_dump() if isinstance(value, Section) else value
    return values


S = TypeVar("S", bound=Section)


def check(
    model: type[S], data: Mapping[str, object], where: str, file: Path | str = "params.yaml"
) -> S:
    """`data` as `model`; raises InputError naming `file` and each offending key, prefixed by
    `where`."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = [f"{file}: {_explain(where, model, item)}"[:600] for item in error.errors()]
    raise InputError("\n".join(lines))


def _explain(where: str, model: type[BaseModel], item: ErrorDetails) -> str:
    location, blocks = _walk(model, item["loc"])
    key = ".".join([where, *location]).strip(".")
    if any(path == tuple(location[: len(path)]) for path in execution_keys(model)):
        key = f"execution.{key}"
    message, given = item["msg"].removeprefix("Value error, "), item.get("input")
    if item["type"] == "extra_forbidden":
        _, blocks = _walk(model, item["loc"][:-1])
        allowed = sorted({name for block in blocks for name in block.model_fields})
        message = "unknown key" + (f"; allowed here: {', '.join(allowed)}" if allowed else "")
    elif item["type"] == "union_tag_not_found":
        message = f"no kind; allowed: {', '.join(kind for b in blocks for kind in _kinds(b))}"
    elif item["type"] == "missing":
        return f"{key}: is missing"
    if not key or isinstance(given, Mapping):  # of several keys, which the message names
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}: {message} (got {given!r})"


def _walk(
    model: type[BaseModel], location: tuple[object, ...]
) -> tuple[list[str], list[type[BaseModel]]]:
    """A place in params.yaml as its keys, and the blocks that may stand there.

    An error's location also names the kind of a block where there are several.
    """
    keys, blocks = [], [model]
    for part in location:
        of_kind = [block for block in blocks if part in _kinds(block)]
        if of_kind:
            blocks = of_kind
            continue
        keys.append(str(part))
        if isinstance(part, str):
            fields = [b.model_fields[part] for b in blocks if part in b.model_fields]
            blocks = [block for field in fields for block in models_in(field.annotation)]
    return keys, blocks


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("kind")
    return getattr(field.annotation, "__args__", ()) if field else ()


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The blocks that a field of this annotation may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in models_in(part)]
