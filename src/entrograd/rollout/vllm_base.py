"""What both vLLM engines share: the requests, the weights' way in, and the proof of a version.

vLLM 0.32. The noise of a completion comes from a generator of its own, seeded by a hash of (seed,
prompt_id, sample_index): batch, order and shard do not change it. They may change the last bits of
a logit, and thereby, rarely, a token: equal to the bit are runs that make the same calls in
process on one machine (docs/vllm.md). With `min_p` beside `top_p` vLLM filters by min_p first.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from entrograd.models.forward import score
from entrograd.models.load import load_model, load_tokenizer, policy_version
from entrograd.rollout.engine import EngineError, Request, Sampled, finish, max_new_tokens
from entrograd.rollout.params import RolloutParams, Sampling
from entrograd.rollout.vllm_settings import (
    Sender,
    SyncClient,
    device_sender,
    engine_dtype,
    on_cpu,
    transfer,
)
from entrograd.storage.hashing import text_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("entrograd")

# What an engine's weights are proved by: letters, digits, signs, several lines.
PROBE = "Question: what is 17 + 25 - 8?\nAnswer: 17 + 25 = 42, 42 - 8 = 34. The answer is 34.\n"
MAX_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.15}


class Output(TypedDict):
    """A completion as vLLM returns it."""

    token_ids: list[int]
    logprobs: list[float]  # of the sampled tokens, nats
    finish_reason: str | None


class VllmEngine(ABC):
    """The Engine protocol on vLLM; `update_weights` ends with a proof or an EngineError.

    A subclass starts vLLM and calls it: in process, or over HTTP.
    """

    policy_version: str

    def __init__(
        self,
        params: RolloutParams,
        folder: Path,
        policy: PreTrainedModel | None,
        work: Path | None = None,
    ) -> None:
        self.work = work  # a folder of this run's own, for the weights on their way
        self.params, self.folder, self.tokenizer = params, folder, load_tokenizer(folder)
        self.max_mismatch = params.vllm.max_mismatch or MAX_GAP[engine_dtype(params)]
        self._scratch: Path | None = None
        self._latest = folder.absolute()  # where a restarted engine finds the current weights
        self._updates = 0
        self._model: Any = None  # the trainer's
        self._sender: Sender | None = None  # from GPU to GPU
        self._probe = self.tokenizer(PROBE)["input_ids"]
        try:
            self._start()
            if policy is None:
                self._expect(load_model(folder, params.dtype, "cpu"))
                self._label_and_prove()
            else:
                self.update_weights(policy)
        except BaseException:
            self.close()
            raise

    def update_weights(self, model: PreTrainedModel) -> None:
        """Send the weights of `model`, forget what was cached under older ones, and prove that
        the engine samples from them."""
        self._expect(model)
        if model is not self._model:
            self._model, self._sender = model, None
        self._send()
        self._label_and_prove()

    def close(self) -> None:
        """End the processes and remove the weights written for them."""
        self._stop()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = None

    # --- what a subclass does --------------------------------------------------------------------

    @abstractmethod
    def _start(self) -> None:
        """Start vLLM, or reach it, on the weights in `_latest`; sets `_context`."""

    @abstractmethod
    def _stop(self) -> None: ...

    @abstractmethod
    def _rpc(self, method: str, **arguments: str) -> None:
        """Have every worker call one of its methods."""

    @abstractmethod
    def _label(self, version: str) -> None:
        """Empty the prefix cache and name the weights: every completion then carries the name."""

    @abstractmethod
    def _prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of each of `ids` but the first, at temperature 1."""

    @abstractmethod
    def _sync_client(self) -> SyncClient:
        """The engine's weight-transfer calls."""

    # --- weights ---------------------------------------------------------------------------------

    def _awake(self) -> None:
        """Ready to take weights and requests."""
        return

    def _send(self) -> None:
        self._awake()
        if (backend := transfer(self.params)) != "folder":
            # Untested without a GPU; the proof that follows is the same.
            self._sender = self._sender or device_sender(
                backend, self.params, self._sync_client(), self._model
            )
            self._sender.send_weights()
            return
        self._scratch = self._scratch or self._make_scratch()
        before, self._updates = self._latest, self._updates + 1
        self._latest = self._scratch.absolute() / f"{self._updates:06d}-{self.policy_version}"
        self._model.save_pretrained(self._latest)
        self._reload()
        if before.parent == self._latest.parent:
            shutil.rmtree(before, ignore_errors=True)

    def _make_scratch(self) -> Path:
        """A folder for weights. In a run that goes on, what its killed predecessor left there is
        removed; without a run's own folder it is a temporary one."""
        parent = self.params.vllm.weights_folder
        if self.work is None:
            if parent:
                Path(parent).mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="entrograd-weights-", dir=parent))
        name = f"entrograd-weights-{self.work.name}"
        folder = Path(parent) / name if parent else self.work / "weights"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _reload(self) -> None:
        """Have every worker read the weights in `_latest`."""
        self._rpc("reload_weights", weights_path=str(self._latest))
        if on_cpu():
            self._rpc("repack_heads")

    def _restore(self) -> None:
        """After a restart: the weights it was given last, named and proved."""
        if self._sender is not None:
            if policy_version(self._model) != self.policy_version:
                raise EngineError("vLLM died and the trainer's weights have moved on since; resume")
            self._sender = None
            self._send()
        self._label_and_prove()

    def _expect(self, model: PreTrainedModel) -> None:
        self.policy_version = policy_version(model)
        probe = self._probe
        self._expected = score(model, [probe[:1]], [probe[1:]], 1.0, len(probe))[0][0]

    def _label_and_prove(self) -> None:
        """EngineError where the engine's log-probabilities of the probe are not the trainer's."""
        self._label(self.policy_version)
        found = self._prompt_logprobs(self._probe)
        pairs = zip(found, self._expected, strict=True)
        mismatch = sum(abs(a - b) for a, b in pairs) / len(found)
        log.info("vLLM has weights %s; probe mismatch %.2e nats", self.policy_version, mismatch)
        if not mismatch <= self.max_mismatch:
            raise EngineError(
                f"vLLM does not have the weights {self.policy_version}: its log-probabilities of a "
                f"fixed text differ from the trainer's by {mismatch:.4g} nats on average, allowed "
                f"are {self.max_mismatch:g} (rollout.vllm.max_mismatch); where both have the same "
                "weights, give engine and trainer the same dtype or raise the bound"
            )

    # --- completions -----------------------------------------------------------------------------

    def _completion(self, request: Request, output: Output, sampling: Sampling) -> Sampled:
        """vLLM's completion, checked."""
        ids, logprobs, reason = output["token_ids"], output["logprobs"], output["finish_reason"]
        if reason not in ("stop", "length") or len(ids) != len(logprobs):
            raise EngineError(
                f"prompt {request.prompt_id}: vLLM ended with {reason!r}, "
                f"{len(ids)} tokens and {len(logprobs)} log-probabilities"
            )
        if not all(math.isfinite(value) and value > -9999 for value in logprobs):
            raise EngineError(f"prompt {request.prompt_id}: vLLM gave a log-probability of -inf")
        if sampling.temperature == 0:
            logprobs = [0.0] * len(ids)
        return finish(self.tokenizer, ids, logprobs, reason, sampling)


def sampling_arguments(request: Request, sampling: Sampling, seed: int) -> dict[str, object]:
    """vLLM's SamplingParams of one request, each named: a model's own defaults never apply."""
    new = max_new_tokens(request, sampling)
    return {
        "max_tokens": new,
        "min_tokens": min(sampling.min_new_tokens, new),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "stop": sampling.stop,
        "seed": request_seed(seed, request),
        "logprobs": 0,  # the sampled token's alone
    }


def request_seed(seed: int, request: Request) -> int:
    """[0, 2**63): a function of (seed, prompt_id, sample_index) alone."""
    return int(text_hash(str(seed), request.prompt_id, str(request.sample_index))[:16], 16) >> 1
