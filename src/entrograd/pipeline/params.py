"""Where shards are computed: `executor` in sections rollout and annotate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from entrograd.params import Positive, Section


class Executor(Section):
    """Where shards are computed: one after another in the stage (`inline`), in `workers` processes
    of this machine (`processes`; GPUs are dealt out), or by `workers` of Ray (`ray`), each with
    `cpus` and `gpus`, of the cluster at `address` (one started for the run where null). A stage's
    inputs must lie at the same path on every machine. Results do not depend on it."""

    kind: Literal["inline", "processes", "ray"] = "inline"
    workers: Positive = 2
    address: str | None = None
    cpus: Annotated[int, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _address_of_ray(self) -> Executor:
        if self.address is not None and self.kind != "ray":
            raise ValueError("address belongs to kind ray; remove it or change the kind")
        return self
