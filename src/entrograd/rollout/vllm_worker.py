"""What vLLM's workers are taught: the class is named to vLLM as `worker_extension_cls`."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """Methods every worker gets, called by collective_rpc."""

    def repack_heads(self) -> None:
        """Pack output heads anew from their weights.

        On a CPU vLLM 0.32 multiplies with packed copies of weights. `reload_weights` renews that of
        each layer it reads; a head tied to the embedding is not read, and would keep its old copy.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        worker: Any = self
        for module in worker.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
