"""Parameters and sections for tests of stages."""

from __future__ import annotations

from typing import Any

from pydantic import create_model

from entrograd.params import Section
from entrograd.pipeline.sections import Params


def only(*sections: str) -> type[Section]:
    """The model of these sections alone, as a stage that reads them has one."""
    fields: Any = {name: (Params.model_fields[name].annotation, ...) for name in sections}
    return create_model("Only", __base__=Section, **fields)


PARAMS = """
base_model: {reference: "path:none"}
prepare: {sources: [{kind: file, path: none.jsonl}]}
rollout: {}
annotate: {}
method: {name: grpo}
train_offline: {}
train_online: {}
evaluate: {}
score: {}
report: {}
"""
