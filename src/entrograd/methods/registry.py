"""What turns section `method` of params.yaml into a recipe: components loaded by name, and their
parameters, strictly checked."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, create_model

from entrograd.errors import InputError
from entrograd.methods.components import (
    KINDS,
    AdvantageEstimator,
    Component,
    PolicyLoss,
    PromptWeighting,
    RewardComposer,
)
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import CHOICES, COMPONENTS
from entrograd.methods.recipe import Recipe
from entrograd.params import Section, check

log = logging.getLogger("entrograd")

C = TypeVar("C", bound=Component)


def recipe(section: MethodParams) -> Recipe:
    """The preset of `section`, with the components and parameters it overrides.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, or a combination that
            has no meaning; the message names the key and what is allowed.
    """
    names = section.choices
    for name, block in section.blocks.items():
        _check_block(name, block, names)
    reward = build(RewardComposer, names, section.blocks)
    advantage = build(AdvantageEstimator, names, section.blocks)
    if reward.label_free and advantage.by_correctness:
        raise InputError(
            f"params.yaml: method.advantage: {advantage.name} tells correct from incorrect "
            f"completions and {reward.name}'s reward uses no labels; take the advantage of grpo or "
            "dr_grpo"
        )
    return Recipe(
        name=section.name,
        title=section.title,
        reward=reward,
        advantage=advantage,
        weighting=build(PromptWeighting, names, section.blocks),
        loss=build(PolicyLoss, names, section.blocks),
        estimator=section.blocks.get("seed_grpo", {}).get("estimator", "rao"),
    )


def component(kind: type[C], name: str) -> type[C]:
    """The component of that kind and name, its module loaded."""
    module, _, attribute = COMPONENTS[kind.choice][name].partition(":")
    found = getattr(import_module(module), attribute)
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise TypeError(f"{module}:{attribute} is no {kind.__name__}")
    return found


def owner(key: str, names: Mapping[str, str]) -> type[Component] | None:
    """The component in use that has the parameter `key`."""
    parts = (component(kind, names[kind.choice]) for kind in KINDS)
    return next((part for part in parts if key in _block_model((part,)).model_fields), None)


def build(kind: type[C], names: Mapping[str, str], blocks: Mapping[str, Mapping[str, object]]) -> C:
    """The component in use of that kind with its parameters; `blocks` are checked."""
    name = names[kind.choice]
    return _with(component(kind, name), name, blocks.get(name, {}))


def _with(part: type[C], name: str, block: Mapping[str, object]) -> C:
    """The component with its own of the parameters of `block`, strictly checked."""
    model = _block_model((part,))
    own = {key: value for key, value in block.items() if key in model.model_fields}
    checked = check(model, own, f"method.{name}")
    try:
        return part(**{key: getattr(checked, key) for key in model.model_fields})
    except ValueError as error:
        raise InputError(f"params.yaml: method.{name}: {error}") from None


def _check_block(name: str, block: object, names: Mapping[str, str]) -> None:
    """InputError if `block` holds anything but parameters of the components called `name`; a
    warning for those whose component is not in use, and InputError for the overlong penalty, which
    is asked for only there."""
    parts = [component(kind, name) for kind in KINDS if name in COMPONENTS[kind.choice]]
    if not parts:
        known = dict.fromkeys(name for names in COMPONENTS.values() for name in names)
        raise InputError(
            f"params.yaml: method.{name}: unknown key; allowed here: name, {', '.join(CHOICES)}, "
            f"and a block for any of {', '.join(known)}"
        )
    where = f"method.{name}"
    if not isinstance(block, Mapping):
        raise InputError(f"params.yaml: {where}: expected keys and values (got {block!r})")
    model = _block_model(tuple(parts))
    for key in block:
        if key not in model.model_fields and (reads := owner(key, names)):
            raise InputError(
                f"params.yaml: {where}.{key}: unknown key; it is a parameter of the {reads.choice} "
                f"in use: set method.{reads.name}.{key}"
            )
    check(model, block, where)
    for part in parts:
        _warn_if_unused(_with(part, name, block), block, names[part.choice])


def _warn_if_unused(part: Component, block: Mapping[str, object], used: str) -> None:
    """A warning for each parameter of `block` that differs from the default of `part`, if `used`
    takes its place."""
    if part.name == used:
        return
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        if item.name not in block or value == _default(item):
            continue
        what, why = f"method.{part.name}.{item.name}", f"the {part.choice} is {used}"
        if item.name == "overlong_length":
            raise InputError(
                f"params.yaml: {what}: no component reads it: {why}; set method.{part.choice}: "
                f"{part.name}, or method.{used}.overlong_length"
            )
        if (part.name, item.name) != ("seed_grpo", "estimator"):  # the diagnostics read it too
            remedy = f"set method.{part.choice}: {part.name}"
            log.warning("%s = %s has no effect, %s; %s", what, value, why, remedy)


class _Block(Section):
    """Parameters of components, some of which may be infinite, as ENCORE's tau."""

    model_config = ConfigDict(allow_inf_nan=True)


@functools.cache
def _block_model(parts: tuple[type[Component], ...]) -> type[Section]:
    """A closed pydantic model with the parameters of these components."""
    known: dict[str, Any] = {}
    for part in parts:
        hints = get_type_hints(part, include_extras=True)
        known |= {
            item.name: (hints[item.name], _default(item)) for item in dataclasses.fields(part)
        }
    return create_model(f"{parts[0].name}_block", __base__=_Block, **known)


def _default(item: dataclasses.Field[object]) -> object:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default
