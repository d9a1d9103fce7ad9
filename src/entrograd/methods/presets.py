"""What section `method` of params.yaml can name: components, and methods as presets of four.

Literals alone: a component is loaded when a run uses it. A new one is its file and its line here.
"""

from __future__ import annotations

from typing import NamedTuple

# choice -> name -> module:class
COMPONENTS: dict[str, dict[str, str]] = {
    "reward": {
        "single": "entrograd.methods.reward.single:Single",
        "weighted": "entrograd.methods.reward.weighted:Weighted",
        "encore": "entrograd.methods.reward.encore:Encore",
        "empo": "entrograd.methods.reward.empo:Empo",
    },
    "advantage": {
        "grpo": "entrograd.methods.advantage.grpo:Grpo",
        "dr_grpo": "entrograd.methods.advantage.dr_grpo:DrGrpo",
        "high_entropy_tokens": "entrograd.methods.advantage.high_entropy_tokens:HighEntropyTokens",
        "gtpo": "entrograd.methods.advantage.gtpo:Gtpo",
        "grpo_s": "entrograd.methods.advantage.grpo_s:GrpoS",
        "asr": "entrograd.methods.advantage.asr:Asr",
    },
    "weighting": {
        "none": "entrograd.methods.weighting.none:Unweighted",
        "seed_grpo": "entrograd.methods.weighting.seed_grpo:SeedGrpo",
    },
    "loss": {
        "grpo": "entrograd.methods.loss.grpo:Grpo",
        "dapo": "entrograd.methods.loss.dapo:Dapo",
        "dr_grpo": "entrograd.methods.loss.dr_grpo:DrGrpo",
        "gspo": "entrograd.methods.loss.gspo:Gspo",
        "cispo": "entrograd.methods.loss.cispo:Cispo",
        "grpo_s": "entrograd.methods.loss.grpo_s:GrpoS",
    },
}


class Preset(NamedTuple):
    """A method: the name of each of its four components."""

    reward: str
    advantage: str
    weighting: str
    loss: str


CHOICES = Preset._fields

# name: reward, advantage, weighting, loss
PRESETS: dict[str, Preset] = {
    "grpo": Preset("single", "grpo", "none", "grpo"),
    "dapo": Preset("single", "grpo", "none", "dapo"),
    "dr_grpo": Preset("single", "dr_grpo", "none", "dr_grpo"),
    "gspo": Preset("single", "grpo", "none", "gspo"),
    "cispo": Preset("single", "grpo", "none", "cispo"),
    "high_entropy_tokens": Preset("single", "high_entropy_tokens", "none", "dapo"),
    "empo": Preset("empo", "grpo", "none", "grpo"),
    "seed_grpo": Preset("single", "dr_grpo", "seed_grpo", "dr_grpo"),
    "gtpo": Preset("single", "gtpo", "none", "dapo"),
    "grpo_s": Preset("single", "grpo_s", "none", "grpo_s"),
    "encore": Preset("encore", "grpo", "none", "grpo"),
    "asr": Preset("single", "asr", "none", "grpo"),
    "weighted": Preset("weighted", "grpo", "none", "grpo"),
}
