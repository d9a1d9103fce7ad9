"""Section base_model of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from entrograd.params import Section


class BaseModelParams(Section):
    """Stage base_model. `reference`: pypi:PACKAGE==VERSION#FILE, hf:OWNER/NAME@REVISION or
    path:DIR; `sha256` is that of the referenced file (pypi) and is checked."""

    reference: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    def files(self) -> list[str]:
        return local(self.reference)


def local(reference: str) -> list[str]:
    """The folder a reference path:DIR names, if it is one."""
    return [reference.removeprefix("path:")] if reference.startswith("path:") else []


class BaseModelStage(Section):
    """What stage base_model reads."""

    base_model: BaseModelParams
