"""TRL's side of `make bench-step`, in TRL's own environment: one step of GRPOTrainer a line of
standard input, its seconds as JSON. What is not set here is TRL's default."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "DO_NOT_TRACK": "1"})

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from entrograd.environment import peak_mib

# Weights' dtype and autocast. TRL's default is float32 weights under bfloat16 autocast.
SETTINGS = {
    "float32": ("float32", False),
    "bfloat16_autocast": ("float32", True),
    "bfloat16": ("bfloat16", False),
}


class Timed(GRPOTrainer):
    """GRPOTrainer with the clock read around generation and around all that prepares a batch."""

    spent: dict[str, tuple[float, float]]

    def _generate(self, *args: object, **kwargs: object) -> object:
        start = _now()
        result = super()._generate(*args, **kwargs)
        self.spent["generation"] = _since(start)
        return result

    def _generate_and_score_completions(self, inputs: object) -> object:
        start = _now()
        result = super()._generate_and_score_completions(inputs)
        both = _since(start)
        self.spent["scoring"] = _minus(both, self.spent["generation"])
        return result


class Turns(TrainerCallback):
    """Waits for a line before each step and prints its seconds after it."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.start = (0.0, 0.0)

    def on_train_begin(self, *_: object, **__: object) -> None:
        print("ready", flush=True)

    def on_step_begin(self, *_: object, **__: object) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # no further turn: the trainer has no way to stop before a step
        self.trainer.spent = {}
        self.start = _now()

    def on_step_end(self, *_: object, **__: object) -> None:
        spent, total = self.trainer.spent, _since(self.start)
        spent["update"] = _minus(_minus(total, spent["generation"]), spent["scoring"])
        lengths = self.trainer._metrics["train"]["completions/mean_length"]
        result = {
            "seconds": {name: values[0] for name, values in spent.items()},
            "cpu_seconds": {name: values[1] for name, values in spent.items()},
            "peak_mb": peak_mib(),
            "mean_length": lengths[-1],
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(result), flush=True)


def main() -> None:
    """Arguments: a JSON object {model, setting, texts, prompt, group, completion}."""
    warnings.filterwarnings("ignore")
    options = json.loads(sys.argv[1])
    dtype, autocast = SETTINGS[options["setting"]]
    new = options["completion"]
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    for text in options["texts"]:
        assert len(tokenizer(text)["input_ids"]) == options["prompt"]

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]

    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=options["model"],
            reward_funcs=reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": options["texts"]}),
            callbacks=[turns],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=autocast,
                model_init_kwargs={"dtype": dtype},
                gradient_checkpointing=False,  # memory is not short here, and it takes time
                per_device_train_batch_size=2 * options["group"],
                num_generations=options["group"],
                max_completion_length=new,
                generation_kwargs={"min_new_tokens": new},
                loss_type="grpo",
                beta=0.0,
                temperature=1.0,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                shuffle_dataset=False,
                max_steps=10_000,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        turns.trainer = trainer
        trainer.train()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    return _minus(_now(), start)


def _minus(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] - b[0], a[1] - b[1]


if __name__ == "__main__":
    main()
