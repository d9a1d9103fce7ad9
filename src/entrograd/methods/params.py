"""Section method of params.yaml."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, ValidationInfo, field_validator, model_validator

from entrograd.methods.presets import CHOICES, COMPONENTS, PRESETS
from entrograd.params import Section

RENAMED = {"credit": "advantage", "modulation": "weighting"}


class MethodParams(Section):
    """A preset by `name`; each of its four components may be replaced by another one. Further keys
    are components' own blocks of parameters, such as `gtpo: {a2: 0.1}`; entrograd.methods.registry
    checks them against the components of that name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str
    reward: str | None = None
    advantage: str | None = None
    weighting: str | None = None
    loss: str | None = None

    @field_validator("name")
    @classmethod
    def _is_a_method(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"unknown method {name!r}; allowed: {', '.join(PRESETS)}")
        return name

    @field_validator(*CHOICES)
    @classmethod
    def _is_a_component(cls, name: str | None, info: ValidationInfo) -> str | None:
        names = COMPONENTS[str(info.field_name)]
        if name is not None and name not in names:
            raise ValueError(f"unknown {info.field_name} {name!r}; allowed: {', '.join(names)}")
        return name

    @model_validator(mode="after")
    def _uses_the_words_of_today(self) -> MethodParams:
        for old, new in RENAMED.items():
            if old in self.blocks:
                raise ValueError(f"{old}: is named method.{new} now")
        return self

    @property
    def title(self) -> str:
        """The preset and the components that replace its own: `gtpo (weighting: seed_grpo)`."""
        others = [f"{choice}: {name}" for choice in CHOICES if (name := getattr(self, choice))]
        return f"{self.name} ({', '.join(others)})" if others else self.name

    @property
    def choices(self) -> dict[str, str]:
        """Choice -> the component in use: the one named, else the preset's."""
        preset = PRESETS[self.name]
        return {choice: getattr(self, choice) or getattr(preset, choice) for choice in CHOICES}

    @property
    def modules(self) -> list[str]:
        """The modules of the four components in use, which are loaded by name."""
        return [COMPONENTS[choice][name].partition(":")[0] for choice, name in self.choices.items()]

    @property
    def corrected(self) -> bool:
        """Whether the policy loss weighs completions by importance."""
        block = self.blocks.get(self.choices["loss"])
        return isinstance(block, dict) and block.get("importance_sampling", "none") != "none"

    @property
    def blocks(self) -> dict[str, Any]:
        """The components' own parameters, by component name."""
        return dict(self.model_extra or {})


class MethodStage(Section):
    """What stage method reads."""

    method: MethodParams
