"""Section method of params.yaml."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from entrograd.params import Section

CHOICES = ("reward", "credit", "modulation", "loss")


class MethodParams(Section):
    """A preset by `name`; each of the four choices may be taken from another method instead.
    Further keys are methods' own blocks, such as `gtpo: {a2: 0.1}`; entrograd.methods checks
    them against the dataclass of the method they name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str
    reward: str | None = None
    credit: str | None = None
    modulation: str | None = None
    loss: str | None = None

    @property
    def title(self) -> str:
        """The preset and the choices taken from elsewhere: `gtpo (modulation: seed_grpo)`."""
        others = [f"{choice}: {name}" for choice in CHOICES if (name := getattr(self, choice))]
        return f"{self.name} ({', '.join(others)})" if others else self.name

    @property
    def choices(self) -> dict[str, str]:
        """Choice -> the method it is taken from, the preset where none is named."""
        return {choice: getattr(self, choice) or self.name for choice in CHOICES}

    @property
    def corrected(self) -> bool:
        """Whether the policy loss weighs completions by importance."""
        block = self.blocks.get(self.loss or self.name)
        return isinstance(block, dict) and block.get("importance_sampling", "none") != "none"

    @property
    def blocks(self) -> dict[str, Any]:
        """The methods' own parameter blocks, by method name."""
        return dict(self.model_extra or {})
