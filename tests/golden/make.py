"""Golden trajectories: 20 updates of a tiny model by every method, on fixed completions.

    python tests/golden/make.py

writes METHOD.json beside this file: loss and gradient norm of each update, in float64. Write them
anew only where a change of the mathematics is meant, and say so in the commit.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))  # run as a script, too

import helpers.environment  # noqa: E402, F401
from entrograd.data.groups import Completion, PromptGroup  # noqa: E402
from entrograd.methods.params import MethodParams  # noqa: E402
from entrograd.methods.presets import PRESETS  # noqa: E402
from entrograd.methods.recipe import Recipe  # noqa: E402
from entrograd.methods.registry import recipe  # noqa: E402
from entrograd.models.load import load_model  # noqa: E402
from entrograd.params import check  # noqa: E402
from entrograd.storage.columns import TOKEN_COLUMNS  # noqa: E402
from entrograd.train.batch import Examples, examples  # noqa: E402
from entrograd.train.forward_backward import StepSettings  # noqa: E402
from entrograd.train.optimizer import Optimizer  # noqa: E402
from entrograd.train.params import Optimizer as OptimizerParams  # noqa: E402
from entrograd.train.policy import Policy  # noqa: E402
from entrograd.train.step import train_step  # noqa: E402
from helpers.tiny_model import write_tiny_model  # noqa: E402

UPDATES = 20
SETTINGS = StepSettings(temperature=1.0, max_length=6, token_budget=60)
HEADS = {"encore": {"entropies": {"format": 0.4, "brevity": 1.1}}}


def choose(name: str) -> Recipe:
    """The preset; ENCORE's weights as of a data set whose heads have these entropies."""
    return recipe(check(MethodParams, {"name": name, **HEADS}, "method"))


def rows(seed: int, groups: int = 3, size: int = 4) -> list[dict[str, Any]]:
    """Annotated rows with every optional column; rewards, lengths and values drawn by `seed`."""
    draw = random.Random(seed)
    built = []
    for group in range(groups):
        prompt = [draw.randrange(3, 80) for _ in range(draw.randrange(2, 6))]
        for sample in range(size):
            length = draw.randrange(1, 7)

            def tokens(low: float, high: float, count: int = length) -> list[float]:
                return [draw.uniform(low, high) for _ in range(count)]

            built.append(
                {
                    "prompt_id": f"p{group}",
                    "sample_index": sample,
                    "prompt_ids": prompt,
                    "completion_ids": [draw.randrange(3, 80) for _ in range(length)],
                    "answer": draw.choice(["1", "2", None]),
                    "reward": float(sample == 0 or (sample < 3 and draw.random() < 0.5)),
                    "reward_heads": [
                        {"name": name, "value": draw.randrange(5) / 4}
                        for name in ("format", "brevity")
                    ],
                    "old_logprobs": tokens(-5.0, -3.5),
                    "sampling_logprobs": tokens(-5.0, -3.5),
                    "ref_logprobs": tokens(-5.0, -3.5),
                    "token_scores": tokens(-1.0, 1.0),
                    "entropies": tokens(1.0, 4.0),
                    "segment_ids": None,
                    "cluster_id": draw.randrange(3),
                }
            )
    return built


def groups(seed: int) -> list[PromptGroup]:
    """`rows` as groups, their token columns in float64."""
    built: dict[str, PromptGroup] = {}
    for row in rows(seed):
        group = PromptGroup(row["prompt_id"], np.array(row["prompt_ids"]), [])
        completion = Completion(
            sample_index=row["sample_index"],
            completion_ids=np.array(row["completion_ids"]),
            completion_text="",
            finish_reason="stop",
            seed=0,
            policy_version="",
            tokens={name: np.array(row[name]) for name in TOKEN_COLUMNS if row[name] is not None},
            answer=row["answer"],
            reward=row["reward"],
            reward_heads={head["name"]: head["value"] for head in row["reward_heads"]},
            cluster_id=row["cluster_id"],
        )
        built.setdefault(group.prompt_id, group).completions.append(completion)
    return list(built.values())


def batch(seed: int) -> Examples:
    """`rows` as the examples of one update, in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return examples(groups(seed), torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)


class Norm(torch.nn.Module):
    """RMS norm in the precision of its input: that of transformers always computes in float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mean = states.pow(2).mean(-1, keepdim=True)
        normed: torch.Tensor = self.weight * states * torch.rsqrt(mean + self.epsilon)
        return normed


def float64_model(path: Path) -> Any:
    """The model with every product and sum in float64."""
    model = load_model(path, "float32", "cpu").double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, Norm(child))
    return model


def trajectory(name: str, model: Path) -> list[dict[str, float]]:
    """Loss and gradient norm of every update of a run in float64."""
    subject = float64_model(model)
    policy = Policy(subject, Optimizer(subject, {}, OptimizerParams(lr=1e-3), UPDATES))
    measured = [train_step(policy, choose(name), batch(seed), SETTINGS) for seed in range(UPDATES)]
    return [{"loss": m["loss"], "grad_norm": m["grad_norm"]} for m in measured]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model")
        for name in PRESETS:
            lines = ",\n".join(json.dumps(row) for row in trajectory(name, model))
            (FOLDER / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
