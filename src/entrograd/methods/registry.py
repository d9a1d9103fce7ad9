"""The registry of methods, and what turns section `method` of params.yaml into a recipe."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_type_hints

from pydantic import ConfigDict, create_model

from entrograd.errors import InputError
from entrograd.methods.base import Method, Recipe
from entrograd.methods.options import read_by
from entrograd.methods.params import MethodParams
from entrograd.params import Section, check

log = logging.getLogger("entrograd")

# A method is a file here, of its name, that holds `METHOD`.
METHODS: dict[str, Method] = {
    name: import_module(f"entrograd.methods.{name}").METHOD
    for name in (
        "grpo",
        "dapo",
        "dr_grpo",
        "gspo",
        "cispo",
        "high_entropy_tokens",
        "empo",
        "seed_grpo",
        "gtpo",
        "grpo_s",
        "encore",
        "asr",
        "weighted",
    )
}

# Words for a choice that takes nothing: GRPO's reward is the graded one, its modulation none.
PLAIN = {"reward": "single", "modulation": "none"}


def recipe(section: MethodParams) -> Recipe:
    """The preset of `section`, with the choices and parameters it overrides.

    Raises:
        InputError: an unknown method or key, a value of the wrong type or out of range, or a
            combination that has no meaning; the message names the key and what is allowed.
    """
    preset = _method(section.name, "name")
    choices = {choice: _method(name, choice) for choice, name in section.choices.items()}
    unknown = [name for name in section.blocks if name not in METHODS]
    if unknown:
        raise InputError(
            f"params.yaml: method.{unknown[0]}: unknown key; allowed here: name, reward, credit, "
            f"modulation, loss, and a block for any of {', '.join(METHODS)}"
        )
    if choices["reward"].label_free and choices["credit"].by_correctness:
        raise InputError(
            f"params.yaml: method.credit: {choices['credit'].name} tells correct from incorrect "
            f"completions and {choices['reward'].name}'s reward uses no labels; take the credit of "
            "grpo or dr_grpo"
        )
    params = {name: build_params(name, section.blocks.get(name, {})) for name in METHODS}
    for name in METHODS:
        for parameter in section.blocks.get(name, {}):
            _check_read(choices, name, parameter, params[name])
    return Recipe(name=preset.name, params=params, **choices)


def _check_read(choices: Mapping[str, Method], name: str, parameter: str, params: Any) -> None:
    """A warning where `parameter` of method `name` was changed and the choice that reads it is
    another method's; InputError if it is the overlong penalty, which is asked for only there."""
    reader = read_by(METHODS[name], parameter)
    value, chosen = getattr(params, parameter), choices[reader].name
    if chosen == name or value == getattr(METHODS[name].params(), parameter):
        return
    what = f"method.{name}.{parameter}"
    why = f"no choice reads it: the {reader} is {chosen}'s; set method.{reader}: {name}"
    if parameter == "overlong_length":
        raise InputError(
            f"params.yaml: {what}: {why}, or overlong_length of the reward in use (dapo, encore, "
            "weighted and empo have it)"
        )
    if (name, parameter) != ("seed_grpo", "estimator"):  # the diagnostics read it too
        log.warning("%s = %s has no effect, %s", what, value, why)


def build_params(name: str, block: Any) -> Any:
    """The params dataclass of method `name` from its block of params.yaml, strictly checked."""
    method = METHODS[name]
    where = f"method.{name}"
    if not isinstance(block, Mapping):
        raise InputError(f"params.yaml: {where}: expected keys and values (got {block!r})")
    model = _block_model(name)
    checked = check(model, block, where)
    try:
        return method.params(**{key: getattr(checked, key) for key in model.model_fields})
    except ValueError as error:
        raise InputError(f"params.yaml: {where}: {error}") from None


class _Block(Section):
    """A method's own parameters, some of which may be infinite, as ENCORE's tau."""

    model_config = ConfigDict(allow_inf_nan=True)


@functools.cache
def _block_model(name: str) -> type[Section]:
    """A closed pydantic model with the fields of the method's params dataclass."""
    params = METHODS[name].params
    hints = get_type_hints(params, include_extras=True)
    known: dict[str, Any] = {
        item.name: (hints[item.name], _default(item)) for item in dataclasses.fields(params)
    }
    return create_model(f"{name}_block", __base__=_Block, **known)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _method(name: str, choice: str) -> Method:
    if PLAIN.get(choice) == name:
        return METHODS["grpo"]
    if name not in METHODS:
        plain = f", {PLAIN[choice]}" if choice in PLAIN else ""
        raise InputError(
            f"params.yaml: method.{choice}: unknown method {name!r}; allowed: "
            f"{', '.join(METHODS)}{plain}"
        )
    return METHODS[name]
