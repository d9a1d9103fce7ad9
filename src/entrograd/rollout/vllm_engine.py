"""vLLM in this process: its workers are children, started with it and ended with it.

vLLM spawns them, so a script that uses this engine runs under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import TYPE_CHECKING, TypeVar

from transformers import AutoConfig

from entrograd.pipeline.progress import Progress
from entrograd.rollout.engine import EngineError, Request, Sampled, check_requests
from entrograd.rollout.params import Sampling
from entrograd.rollout.vllm_base import Output, VllmEngine, sampling_arguments
from entrograd.rollout.vllm_settings import (
    engine_arguments,
    environment,
    on_cpu,
    require_vllm,
    transfer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm import LLM, CompletionOutput
    from vllm.v1.engine.core_client import SyncMPClient

log = logging.getLogger("entrograd")

T = TypeVar("T")


class Drawn(Output):
    """A completion, and the weights that drew it."""

    versions: list[str]


class InProcessVllm(VllmEngine):
    """A call is drawn whole: where the engine dies it is started again and the call with it."""

    _llm: LLM = None
    _asleep = False

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Sampled]:
        """One completion a request, in order; equal to the bit for equal calls on one machine."""
        check_requests(requests, sampling, self._context)

        def draw(attempt: int) -> list[Drawn]:
            if attempt:
                self._restore()
            return self._draw(requests, sampling, seed)

        outputs = self._survive(draw)
        if progress:
            progress.advance(len(requests))
        return [
            self._completion(request, output, sampling)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def update_weights(self, model: PreTrainedModel) -> None:
        """See VllmEngine."""
        update = super().update_weights
        self._survive(lambda _: update(model))

    def _survive(self, call: Callable[[int], T]) -> T:
        """`call(attempt)`; where vLLM dies meanwhile it is started and called again."""
        dead = _dead_error()
        for attempt in range(self.params.vllm.retries):
            try:
                if attempt:
                    self._stop()
                    self._start()
                return call(attempt)
            except dead as error:
                log.warning("vLLM died (%s); it is started again", error)
        raise EngineError(
            f"vLLM died {self.params.vllm.retries} times in one call; its own log tells why "
            "(VLLM_LOGGING_LEVEL=INFO). Out of memory: lower rollout.vllm.max_num_seqs, "
            "kv_cache_gib or gpu_memory_utilization"
        )

    def _draw(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Drawn]:
        from vllm import SamplingParams

        self._awake()
        # Queue all, then let go: batches depend on the requests, not on how fast they arrive.
        self._llm.reset_prefix_cache()
        self._llm.sleep(level=0, mode="keep")
        self._llm.enqueue(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [SamplingParams(**sampling_arguments(r, sampling, seed)) for r in requests],
            use_tqdm=False,
        )
        self._llm.wake_up(tags=["scheduling"])
        outputs = [_drawn(o.outputs[0]) for o in self._llm.wait_for_completion(use_tqdm=False)]
        wrong = {version for output in outputs for version in output["versions"]}
        if wrong - {self.policy_version}:
            raise EngineError(f"vLLM sampled from {sorted(wrong)}, not {self.policy_version}")
        if self._sleeps():
            self._llm.sleep(level=1)
            self._asleep = True
        return outputs

    # --- what VllmEngine asks for ----------------------------------------------------------------

    def _start(self) -> None:
        require_vllm("vllm")
        os.environ.update(environment(self.params))  # its children inherit it
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        self._context = self.params.vllm.max_model_len or config.max_position_embeddings
        arguments = engine_arguments(self.params, config.max_position_embeddings)
        if (backend := transfer(self.params)) != "folder":
            from vllm.config.weight_transfer import WeightTransferConfig

            arguments["weight_transfer_config"] = WeightTransferConfig(backend=backend)
        from vllm import LLM

        try:
            self._llm = LLM(
                str(self._latest),
                tokenizer=str(self.folder.absolute()),
                enable_sleep_mode=self._sleeps(),
                **arguments,
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"vLLM does not start: {error}. Its own log tells more "
                "(VLLM_LOGGING_LEVEL=INFO); memory is set by "
                "execution.rollout.vllm.kv_cache_gib and gpu_memory_utilization"
            ) from error
        self._asleep = False
        _watch(self._llm.llm_engine.engine_core)

    def _stop(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def _rpc(self, method: str, **arguments: str) -> None:
        self._llm.collective_rpc(method, kwargs=arguments)

    def _label(self, version: str) -> None:
        self._llm.reset_prefix_cache()
        self._llm.update_weight_version(version)

    def _prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        (output,) = self._llm.generate(
            [{"prompt_token_ids": list(ids)}],
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
            use_tqdm=False,
        )
        return [
            output.prompt_logprobs[place][token].logprob for place, token in enumerate(ids) if place
        ]

    def _sync_client(self) -> _SyncClient:
        return _SyncClient(self._llm)

    # --- sleep, on GPUs --------------------------------------------------------------------------

    def _sleeps(self) -> bool:
        chosen = self.params.vllm.sleep
        return not on_cpu() if chosen is None else chosen

    def _awake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


class _SyncClient:
    """vLLM's VLLMWeightSyncClient on an LLM of this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: object) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


def _drawn(output: CompletionOutput) -> Drawn:
    return {
        "token_ids": list(output.token_ids),
        "logprobs": [
            at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)
        ],
        "finish_reason": output.finish_reason,
        "versions": [span.version for span in output.weight_versions or ()],
    }


def _watch(core: SyncMPClient) -> None:
    """vLLM 0.32 waits for ever for the answer of an engine process that was killed: whoever waits
    gets vLLM's error instead."""
    sentinels = [process.sentinel for process in core.resources.engine_manager.processes]
    dead = _dead_error()

    def watch() -> None:
        connection.wait(sentinels)
        core.outputs_queue.put(dead())
        for future in list(core.utility_results.values()):
            if not future.done():
                future.set_exception(dead())

    threading.Thread(target=watch, daemon=True).start()


def _dead_error() -> type[Exception]:
    from vllm.v1.engine.exceptions import EngineDeadError

    error: type[Exception] = EngineDeadError
    return error
