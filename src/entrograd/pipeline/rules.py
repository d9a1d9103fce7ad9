"""Reading params.yaml: the sections that are asked for, and the rules that span several of them.

A rule is a function of sections, named as in params.yaml, that raises ValueError. It is checked
where all its sections are read: by `entrograd check`, and by a stage before it loads anything.
"""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml

from entrograd.errors import InputError
from entrograd.params import SECTIONS, Section, check
from entrograd.pipeline.keys import check_execution, check_names, merged

if TYPE_CHECKING:
    from entrograd.methods.params import MethodParams
    from entrograd.rollout.params import RolloutParams
    from entrograd.train.params import TrainOnlineParams

S = TypeVar("S", bound=Section)


def sampling_filters_are_corrected(rollout: RolloutParams, method: MethodParams) -> None:
    """A ratio between filtered and unfiltered distributions needs importance weights."""
    sampling, loss = rollout.sampling, method.choices["loss"]
    used = [
        key
        for key, off in {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0}.items()
        if getattr(sampling, key) != off
    ]
    if used and not method.corrected:
        raise ValueError(
            f"rollout.sampling.{used[0]}: completions come from a filtered distribution, and "
            f"the ratio of {loss} takes them for the policy's own, which biases every update; "
            f"remove it or set method.{loss}.importance_sampling: truncated (or masked)"
        )


def prefetch_fits(
    rollout: RolloutParams, method: MethodParams, train_online: TrainOnlineParams
) -> None:
    """A round drawn ahead needs an engine of its own, a fixed size and importance weights."""
    loss = method.choices["loss"]
    if not train_online.prefetch:
        return
    if rollout.engine == "transformers":
        raise ValueError(
            "train_online.prefetch: engine transformers samples from the very weights that are "
            "being updated; set rollout.engine: vllm_server (or vllm), or prefetch: false"
        )
    if train_online.dynamic_sampling is not None:
        raise ValueError(
            "train_online.prefetch: with dynamic_sampling a round's size depends on grades, "
            "which are not there while it is drawn ahead; remove one of the two"
        )
    if not method.corrected:
        raise ValueError(
            "train_online.prefetch: completions come from the policy before the last updates, "
            f"and the ratio of {loss} takes them for the current one's, which biases every "
            f"update; set method.{loss}.importance_sampling: truncated (or masked), or prefetch: "
            "false"
        )


RULES = (sampling_filters_are_corrected, prefetch_fits)


def read(path: Path | str, model: type[S]) -> S:
    """The sections of a params file that `model` has as fields; InputError where the file, a key or
    a rule that spans these sections is broken."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the params.yaml to read") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected sections ({', '.join(SECTIONS)})")
    sections = check(model, _sections(path, model, data), "", path)
    check_rules(sections, path)
    return sections


def check_rules(sections: Section, file: Path | str = "params.yaml") -> None:
    """InputError, naming `file`, if `sections` break a rule that spans several of them."""
    for rule in RULES:
        names = inspect.signature(rule).parameters
        if all(name in type(sections).model_fields for name in names):
            try:
                rule(**{name: getattr(sections, name) for name in names})
            except ValueError as error:
                raise InputError(f"{file}: {error}") from None


def _sections(path: Path, model: type[S], data: dict[str, object]) -> dict[str, object]:
    """What the file holds for the fields of `model`, section `execution` merged into each."""
    allowed = (*SECTIONS, "execution")
    for name in data:
        if name not in allowed:
            close = get_close_matches(str(name), allowed, 1) or allowed
            raise InputError(f"{path}: {name}: unknown section; allowed here: {', '.join(close)}")
    try:
        check_names(data)
        check_execution(data)
        return {
            name: merged(name, _block(field.annotation), data)
            for name, field in model.model_fields.items()
            if name in data
        }
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _block(annotation: object) -> type[Section]:
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


class _Loader(yaml.SafeLoader):
    """Safe YAML that takes 1e-5 for a number, as YAML 1.2 and DVC do; 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
