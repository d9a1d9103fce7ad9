"""What was run: the parameters behind the page's numbers, under their keys in params.yaml."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from entrograd.methods.params import MethodParams
from entrograd.pipeline.sections import Params

WORDS = {
    "reward": "reward composition",
    "advantage": "advantage",
    "weighting": "prompt weighting",
    "loss": "policy loss",
}
_SAMPLED = ("groups", "annotate", "online_curve")
_TRAINED = ("offline_curve", "online_curve")
_TRAINING = """optimizer.lr optimizer.schedule optimizer.warmup_updates optimizer.weight_decay
    optimizer.max_grad_norm lora reference seed"""

# Title, the inputs of the page any of which makes it part of this run (none: it always is), the
# section it is from and the keys shown of it (none: all).
TOPICS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("Model", (*_SAMPLED, *_TRAINED), "base_model", ""),
    ("Problems", ("prepare",), "prepare", "sources heldout_fraction prompt"),
    ("Rollouts", _SAMPLED, "rollout", "engine prompts group_size sampling seed"),
    ("Grading", _SAMPLED, "annotate", "grader.extraction heads clusters"),
    ("Method", _TRAINED, "method", ""),
    ("Offline training", _TRAINED[:1], "train_offline", f"epochs prompts_per_update {_TRAINING}"),
    (
        "Online training",
        _TRAINED[1:],
        "train_online",
        "rounds prompts_per_round prompts_per_update epochs_per_round dynamic_sampling "
        + _TRAINING,
    ),
    (
        "Evaluation",
        (),
        "evaluate",
        "heldout_problems max_new_tokens stop seed grader.extraction",
    ),
    ("Scores", (), "score", ""),
)


@dataclass(frozen=True)
class Topic:
    """Some parameters of the run, key and value as in params.yaml, and a note in words."""

    title: str
    note: str
    pairs: list[tuple[str, str]]


def topics(settings: Params, given: Collection[str], notes: Mapping[str, str]) -> list[Topic]:
    """What the run was, for a page of which the inputs `given` are there: a run without training
    has no method. `notes` are added by title."""
    values = _values(settings)
    method = values["method"]
    used = {"name", *WORDS, *settings.method.choices.values()}
    values["method"] = {key: value for key, value in method.items() if key in used}
    found = []
    for title, needs, section, keys in TOPICS:
        if not needs or not set(given).isdisjoint(needs):
            wanted = [f"{section}.{key}" for key in keys.split()] or [section]
            shown = [pair for key in wanted for pair in pairs(key, _at(values, key))]
            found.append(Topic(title, notes.get(title, ""), shown))
    return found


def whole(settings: Params, given: Collection[str]) -> str:
    """The sections of the topics as a params.yaml, defaults included: with all of them in it, it
    gives the same results where it is read again."""
    shown = {row[2] for row in TOPICS if not row[1] or not set(given).isdisjoint(row[1])}
    values = {key: value for key, value in _values(settings).items() if key in {*shown, "report"}}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def recipe(method: MethodParams) -> str:
    """The four components in words."""
    return ", ".join(f"{WORDS[choice]} {name}" for choice, name in method.choices.items())


def pairs(key: str, value: object) -> Iterator[tuple[str, str]]:
    """Key and value of each entry of a block or of a list of blocks, or of a plain value itself;
    values are written as in YAML, on one line."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield f"{key}.{name}".strip("."), _line(item)
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from pairs(f"{key}[{index}]", item)
    else:
        yield key, _line(value)


def _values(settings: Params) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _at(values: Mapping[str, object], key: str) -> object:
    value: object = values
    for part in key.split("."):
        assert isinstance(value, Mapping)
        value = value[part]
    return value


def _line(value: object) -> str:
    # Within a list: a scalar alone would be followed by an end-of-document mark.
    text = yaml.dump(
        [value],
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=2**31,
    )
    return text.strip()[1:-1]


class _Dumper(yaml.SafeDumper):
    """Line ends within a text are written as \\n: as blank lines, nobody would see them."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if "\n" in text else None
    ),
)
