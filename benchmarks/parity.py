"""Parity with TRL 1.16.0 (`make parity`): the same fixed completions, rewards and tiny random model
through TRL's GRPOTrainer and through this package; loss and gradient must agree to 1e-5, relative.

TRL runs its own code from the rewards on: advantages, old and reference log-probabilities, ratios,
clipping, masks, aggregation. Only generation is replaced, by the fixed completions, and the old
log-probabilities are moved by fixed noise so that ratios leave 1 and some are clipped. Constants
that differ by definition are set alike:

- advantage epsilon: 1e-4 in both, TRL's constant and this package's default;
- CISPO: TRL's epsilon_high is the bound of the weight itself, here the bound is 1 + clip_high;
- GSPO: TRL has it as loss_type grpo with ratios of importance_sampling_level sequence;
- high-entropy mask: TRL takes entropies of the policy in training, here they are columns of the
  batch: it is given the same ones;
- k3 penalty: TRL's own multiplies it by the ratio unless use_bias_correction_kl is off, as here;
- Dr.GRPO: max_completion_length is the constant length.

A group's advantages sum to 0, so a loss may nearly cancel and say nothing of relative differences:
seed and noise are such that none does. Exits with 1 where a row differs by more. Run in an
environment of its own: TRL is no dependency.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import warnings
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "DO_NOT_TRACK": "1",
    }
)

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from entrograd.methods.batch import Batch, denominators
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe
from entrograd.models.forward import completion_logprobs
from entrograd.params import check

TOLERANCE = 1e-5
GROUPS, SIZE, LONGEST, VOCABULARY = 6, 4, 12, 97
PROMPTS = [f"t{3 + g} t{20 + g} t{40 + g}" for g in range(GROUPS)]

KL = {"kl_coefficient": 0.04, "kl_estimator": "k3"}
TOKEN_TRUNCATED = {
    "importance_sampling": "truncated",
    "importance_sampling_level": "token",
    "importance_sampling_cap": 1.05,
}
SEQUENCE_MASKED = {
    "importance_sampling": "masked",
    "importance_sampling_level": "sequence",
    "importance_sampling_cap": 1.2,
}
VLLM = "vllm_importance_sampling"
# row -> (section `method` of params.yaml, arguments of TRL's GRPOConfig)
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"name": "grpo"}, {"loss_type": "grpo"}),
    "grpo, k3 penalty": (
        {"name": "grpo", "grpo": KL},
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    "grpo, truncated correction": (
        {"name": "grpo", "grpo": TOKEN_TRUNCATED},
        {"loss_type": "grpo", f"{VLLM}_mode": "token_truncate", f"{VLLM}_clip_max": 1.05},
    ),
    "grpo, masked correction": (
        {"name": "grpo", "grpo": SEQUENCE_MASKED},
        {"loss_type": "grpo", f"{VLLM}_mode": "sequence_mask", f"{VLLM}_clip_max": 1.2},
    ),
    "dr_grpo": ({"name": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ({"name": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        {"name": "gspo"},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "cispo": (
        {"name": "cispo", "cispo": {"clip_high": 0.1}},
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    "high_entropy_tokens": (
        {"name": "high_entropy_tokens"},
        {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.2},
    ),
}


def make_model(seed: int) -> LlamaForCausalLM:
    """A two-layer Llama of random weights in float64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word per token: t0, t1, ..."""
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t0", eos_token="t1", unk_token="t2"
    )


class Fixed:
    """The completions of every row: ragged, interleaved lengths, rewards 0 or 1, noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(1, LONGEST + 1, (GROUPS * SIZE,), generator=generator).tolist()
        lengths[0] = LONGEST
        self.prompt_ids = [
            [int(word[1:]) for word in prompt.split()] for prompt in PROMPTS for _ in range(SIZE)
        ]
        self.completion_ids = [
            torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths
        ]
        self.mask = torch.arange(LONGEST) < torch.tensor(lengths)[:, None]
        self.rewards = torch.randint(0, 2, (GROUPS * SIZE,), generator=generator).double()
        self.rewards[:SIZE] = 1.0  # a group without signal
        shape = self.mask.shape
        self.old_noise = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.sampling_noise = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)


def gradient(model: torch.nn.Module) -> Tensor:
    """All gradients as one vector; they are cleared."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def padded(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)


def by_trl(
    fixed: Fixed, model: LlamaForCausalLM, reference: LlamaForCausalLM, options: dict[str, object]
) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, gradient and the inputs of TRL's loss."""
    corrected = any(key.startswith(VLLM) for key in options)
    with torch.no_grad():
        now, _ = completion_logprobs(model, fixed.prompt_ids, fixed.completion_ids, 1.0)
    old = padded(now, fixed.mask) + (0.0 if corrected else fixed.old_noise)
    sampling = (old + fixed.sampling_noise) * fixed.mask
    lengths = fixed.mask.sum(-1).tolist()

    def rollout(prompts: list[str], trainer: object) -> dict[str, object]:  # noqa: ARG001
        logprobs = [row[:n].tolist() for row, n in zip(sampling, lengths, strict=True)]
        return {
            "prompt_ids": fixed.prompt_ids,
            "completion_ids": fixed.completion_ids,
            "logprobs": logprobs,
        }

    def reward(completions: list[str], **_: object) -> list[float]:
        assert len(completions) == len(fixed.rewards)
        return fixed.rewards.tolist()

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=GROUPS * SIZE,
            num_generations=SIZE,
            max_completion_length=LONGEST,
            gradient_checkpointing=False,
            **options,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=make_tokenizer(),
            rollout_func=rollout,
        )
        if trainer.ref_model is not None:
            trainer.ref_model.double().load_state_dict(reference.state_dict())
        trainer.current_gradient_accumulation_steps = 1
        if corrected:  # the correction is computed as with vLLM, the engine itself is not needed
            trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
        model.train()  # no dropout in this model: the mode decides how TRL aggregates
        rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(SIZE)]
        inputs = trainer._generate_and_score_completions(rows)
        if not corrected:
            inputs["old_per_token_logps"] = old
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
    return float(loss.detach()), gradient(model), {"old": old, "sampling": sampling, **inputs}


def by_entrograd(
    fixed: Fixed,
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    section: dict[str, object],
    given: dict[str, Tensor],
) -> tuple[float, Tensor]:
    """Loss and gradient of this package, in two micro-batches."""
    with torch.no_grad():
        ref, _ = completion_logprobs(reference, fixed.prompt_ids, fixed.completion_ids, 1.0)
        _, entropies = completion_logprobs(model, fixed.prompt_ids, fixed.completion_ids, 1.0)
    chosen = recipe(check(MethodParams, section, "method"))
    batch = Batch(
        completion_mask=fixed.mask,
        groups=torch.arange(GROUPS).repeat_interleave(SIZE),
        rewards=fixed.rewards,
        old_logprobs=given["old"],
        sampling_logprobs=given["sampling"],
        ref_logprobs=padded(ref, fixed.mask),
        entropies=padded(entropies, fixed.mask),
    )
    advantages, counts = chosen.advantages(batch), denominators(batch, LONGEST)
    total = 0.0
    for rows in torch.arange(GROUPS * SIZE).split(SIZE + 3):
        part = batch.select(rows)
        flat, _ = completion_logprobs(
            model,
            [fixed.prompt_ids[i] for i in rows],
            [fixed.completion_ids[i] for i in rows],
            1.0,
        )
        losses = chosen.policy_loss(padded(flat, part.completion_mask), advantages[rows], part)
        loss = chosen.aggregate(losses, part.completion_mask, counts)
        loss.backward()
        total += float(loss.detach())
    return total, gradient(model)


def main() -> int:
    """Print a line a row; 1 where one differs by more than the tolerance."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    fixed, reference = Fixed(), make_model(2)
    with tempfile.TemporaryDirectory() as folder:  # TRL reads the reference from where it was saved
        make_model(1).save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
        return compare(fixed, model, reference)


def compare(fixed: Fixed, model: LlamaForCausalLM, reference: LlamaForCausalLM) -> int:
    """Every row of the table, and the exit code."""
    print(f"TRL {trl.__version__}, transformers {transformers.__version__}, float64; relative "
          f"differences, at most {TOLERANCE:g}")  # fmt: skip
    print(f"{'method':<28}{'loss, TRL':>15}{'loss, here':>15}{'loss':>10}{'gradient':>10}")
    failed = []
    for name, (section, options) in ROWS.items():
        theirs, their_gradient, given = by_trl(fixed, model, reference, options)
        ours, our_gradient = by_entrograd(fixed, model, reference, section, given)
        loss_gap = abs(ours - theirs) / max(abs(theirs), 1e-12)
        gap = float((our_gradient - their_gradient).norm() / their_gradient.norm())
        ok = loss_gap <= TOLERANCE and gap <= TOLERANCE and math.isfinite(gap)
        failed += [] if ok else [name]
        print(f"{name:<28}{theirs:>15.9f}{ours:>15.9f}{loss_gap:>10.1e}{gap:>10.1e}"
              f"  {'agrees' if ok else 'DIFFERS'}")  # fmt: skip
    if failed:
        print(f"parity: {len(failed)} of {len(ROWS)} differ: {', '.join(failed)}", file=sys.stderr)
        return 1
    print(f"parity: all {len(ROWS)} agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
