"""Our side of `make bench-step`: one online step a line of standard input, its seconds as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from work import step_work

from entrograd.data.groups import Completion, PromptGroup
from entrograd.environment import peak_mib
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe
from entrograd.models.load import load_tokenizer
from entrograd.rollout.engine import Request
from entrograd.rollout.params import Sampling
from entrograd.rollout.transformers_engine import TransformersEngine
from entrograd.train.batch import examples
from entrograd.train.forward_backward import StepSettings
from entrograd.train.params import Optimizer as OptimizerParams
from entrograd.train.params import TrainOfflineParams
from entrograd.train.policy import Policy
from entrograd.train.scoring import Scoring
from entrograd.train.step import train_step


def main() -> None:
    """Arguments: a JSON object {model, dtype, prompts [[ids]], group, completion}."""
    options = json.loads(sys.argv[1])
    folder, new = Path(options["model"]), options["completion"]
    params = TrainOfflineParams(
        dtype=options["dtype"], device="cpu", optimizer=OptimizerParams(lr=1e-6)
    )
    policy = Policy.load(folder, params, updates=100)
    engine = TransformersEngine(policy.model, load_tokenizer(folder), 1 << 16)
    sampling = Sampling(max_new_tokens=new, min_new_tokens=new)
    settings = StepSettings(1.0, new, 1 << 14)
    scoring = Scoring(policy.model, settings, 1 << 15)
    method = recipe(MethodParams(name="grpo"))
    prompts = [tuple(ids) for ids in options["prompts"]]
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        first = number * 2 % len(prompts)
        chosen = prompts[first : first + 2]
        requests = [
            Request(f"p{i}", s, ids)
            for i, ids in enumerate(chosen)
            for s in range(options["group"])
        ]
        marks = [(time.perf_counter(), time.process_time())]

        def mark(marks: list[tuple[float, float]] = marks) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        completions = engine.generate(requests, sampling, number)
        mark()
        groups = {
            request.prompt_id: PromptGroup(request.prompt_id, np.array(request.prompt_ids), [])
            for request in requests
        }
        rows: list[Completion] = []
        for request, completion in zip(requests, completions, strict=True):
            ids = np.array(completion.completion_ids)
            row = Completion(
                sample_index=request.sample_index,
                completion_ids=ids,
                completion_text=completion.text,
                finish_reason=completion.finish_reason,
                seed=number,
                policy_version=engine.policy_version,
                reward=float((ids % 2).mean()),
                cluster_id=0,
            )
            rows.append(row)
            groups[request.prompt_id].completions.append(row)
        scored = scoring(list(groups.values()))
        for row, (logprobs, entropies) in zip(rows, scored, strict=True):
            row.tokens |= {"old_logprobs": logprobs, "entropies": entropies}
        mark()
        batch = examples(list(groups.values()), policy.model.device)
        measured = train_step(policy, method, batch, settings, scoring.take())
        engine.update_weights(policy.model)  # hashes the weights: part of every round
        mark()
        work = step_work(policy.model, batch.prompt_ids, batch.completion_ids)
        assert all(len(ids) == new for ids in batch.completion_ids)
        result = {
            "seconds": _differences([wall for wall, _ in marks]),
            "cpu_seconds": _differences([cpu for _, cpu in marks]),
            "peak_mb": peak_mib(),
            "loss": measured["loss"],
            "grad_norm": measured["grad_norm"],
            "dtype": str(policy.model.dtype).removeprefix("torch."),
            "flops": work.flops,
            "decoder_tokens": work.decoder_tokens,
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(result), flush=True)


def _differences(marks: list[float]) -> dict[str, float]:
    names = ("generation", "scoring", "update")
    return {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}


if __name__ == "__main__":
    main()
