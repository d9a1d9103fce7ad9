"""What runs inside vLLM's own processes. It imports nothing of this package."""

from __future__ import annotations

import os
import select
import threading
from typing import Any

PARENT = "ENTROGRAD_VLLM_PARENT"  # environment: the process that vLLM was started for


class WorkerExtension:
    """Methods every worker gets, called by collective_rpc: `worker_extension_cls` names it."""

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


def end_with_parent() -> None:
    """End this process as soon as the one that PARENT names has ended, killed or not.

    An entry point of group vllm.general_plugins: vLLM calls it in each of its processes as it
    starts. Without it vLLM 0.32 outlives a process that is killed, and keeps its memory. A thread
    watches, since what Linux sends at a parent's death it sends at the death of its thread.
    """
    parent = int(os.environ.get(PARENT, "0"))
    if parent in (0, os.getpid()) or not hasattr(os, "pidfd_open"):
        return
    try:
        handle = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        ended.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
