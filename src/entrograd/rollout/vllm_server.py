"""A vLLM server over HTTP: token ids in, token ids and log-probabilities out.

At `execution.rollout.vllm.url`, or started here on loopback. Each completion is a request of its
own and comes back with the name of the weights that drew it. Where the server goes away, what has
come back is kept; it is waited for (and, if it is ours, started again), given the current weights,
and asked for the rest: nothing is lost, and nothing is taken twice. Of several training processes
one gives the server its weights, and the others wait for them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrograd.errors import InputError
from entrograd.models.forward import score
from entrograd.models.load import load_model
from entrograd.pipeline.progress import Progress
from entrograd.rollout.engine import EngineError, Request, Sampled, check_requests
from entrograd.rollout.params import RolloutParams, Sampling
from entrograd.rollout.vllm_base import Output, VllmEngine, sampling_arguments
from entrograd.rollout.vllm_http import ABSENT, ServerLostError, Wait, call, session
from entrograd.rollout.vllm_process import ManagedServer
from entrograd.rollout.vllm_settings import require_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("entrograd")


class VllmServer(VllmEngine):
    """The Engine protocol on a server; a completion is taken only from the current weights."""

    _child: ManagedServer | None = None

    def __init__(
        self,
        params: RolloutParams,
        folder: Path,
        policy: PreTrainedModel | None,
        work: Path | None = None,
        follows: bool = False,
    ) -> None:
        self.follows = follows  # another process replaces the weights
        self._http = session(params.vllm)
        super().__init__(params, folder, policy, work)
        if params.vllm.url:
            self._check_logprobs(policy or load_model(folder, params.dtype, "cpu"))

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Sampled]:
        """One completion a request, in order."""
        check_requests(requests, sampling, self._context)
        done: dict[int, Sampled] = {}
        for wait in self._attempts():
            before = len(done)
            missing = [row for row in range(len(requests)) if row not in done]
            lost = self._ask(requests, missing, sampling, seed, done, progress)
            if lost is None:
                return [done[row] for row in range(len(requests))]
            log.warning("%d of %d completions are done", len(done), len(requests))
            wait.until_next(lost, progress=len(done) > before)
            with contextlib.suppress(ServerLostError):
                self._recover()
        raise AssertionError("_attempts goes on until it raises")

    def _ask(
        self,
        requests: Sequence[Request],
        rows: Sequence[int],
        sampling: Sampling,
        seed: int,
        done: dict[int, Sampled],
        progress: Progress | None,
    ) -> ServerLostError | None:
        """Ask for `rows` and put what comes back into `done`; the first loss, if there was one.
        After a loss no further request is sent."""
        losses: list[ServerLostError] = []

        def ask(row: int) -> Sampled | None:
            if losses:
                return None
            body = {
                "token_ids": list(requests[row].prompt_ids),
                "sampling_params": sampling_arguments(requests[row], sampling, seed),
            }
            try:
                (choice,) = self._call("inference/v1/generate", body)["choices"]
                versions = {span["version"] for span in choice.get("weight_versions") or ()}
                if versions != {self.policy_version}:
                    raise ServerLostError(f"it sampled from {sorted(versions)}: other weights")
            except ServerLostError as error:
                losses.append(error)
                return None
            content = (choice["logprobs"] or {}).get("content") or ()
            output: Output = {
                "token_ids": list(choice["token_ids"]),
                "logprobs": [token["logprob"] for token in content],
                "finish_reason": choice["finish_reason"],
            }
            return self._completion(requests[row], output, sampling)

        with ThreadPoolExecutor(self.params.vllm.concurrency) as pool:
            asked = {pool.submit(ask, row): row for row in rows}
            for future in as_completed(asked):
                if (completion := future.result()) is not None:
                    done[asked[future]] = completion
                    if progress:
                        progress.advance(1)
        return losses[0] if losses else None

    def _check_logprobs(self, model: PreTrainedModel) -> None:
        """InputError where a server reports log-probabilities of another distribution than the one
        it samples from, as vLLM's do by default."""
        asked = [Request("probe", sample, tuple(self._probe)) for sample in range(8)]
        drawn = self.generate(asked, Sampling(temperature=2.0, max_new_tokens=1), 0)
        prompts, completions = [r.prompt_ids for r in asked], [c.completion_ids for c in drawn]
        want = score(model, prompts, completions, 2.0, 8 * len(self._probe))
        gaps = [
            abs(c.sampling_logprobs[0] - values[0])
            for c, (values, _) in zip(drawn, want, strict=True)
        ]
        if sum(gaps) / len(gaps) > self.max_mismatch:
            raise InputError(
                f"{self._name()}: its log-probabilities are not those of the distribution it "
                "samples from; start it with --logprobs-mode processed_logprobs"
            )

    def _recover(self) -> None:
        """The server reached again, and with the current weights."""
        self._revive()
        if self._call("weight_info", None)["weight_version"] != self.policy_version:
            if self.follows:
                raise ServerLostError("it has not got its weights back")
            if self._sender is None and self._updates:
                self._reload()
            self._restore()

    def _send(self) -> None:
        if not self.follows:
            return super()._send()
        deadline = time.monotonic() + self.params.vllm.start_seconds
        while (found := self._surely("weight_info", None)["weight_version"]) != self.policy_version:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self._name()}: has weights {found}, not {self.policy_version}, which the "
                    "first process should have given it"
                )
            time.sleep(0.05)
        return None

    def _revive(self) -> None:
        """Start our own server again where it has ended: on the weights given last."""
        if self._child is not None and not self._child.alive():
            log.warning("the vLLM server ended (%s); it is started again", self._child.last_words())
            self._stop()
            self._start()

    def _attempts(self) -> Iterator[Wait]:
        wait = Wait(self.params.vllm.retries, self._name())
        while True:
            yield wait

    def _name(self) -> str:
        return f"vLLM server {self._url}"

    # --- what VllmEngine asks for ----------------------------------------------------------------

    def _start(self) -> None:
        chosen = self.params.vllm
        if chosen.url:
            self._url = chosen.url
        else:
            require_vllm("vllm_server")
            self._child = ManagedServer(self.params, self._latest, self.folder)
            self._url = self._child.url
            self._child.wait_until_ready(self._http, chosen.start_seconds)
        try:
            (served, *_) = self._call("v1/models", None)["data"]
        except ServerLostError as error:
            raise EngineError(f"{self._name()}: unreachable: {error}; {ABSENT}") from None
        self._context = int(served["max_model_len"])

    def _stop(self) -> None:
        if self._child is not None:
            self._child.stop()
        self._child = None

    def _rpc(self, method: str, **arguments: str) -> None:
        self._surely("collective_rpc", {"method": method, "kwargs": arguments})

    def _label(self, version: str) -> None:
        if self.follows:
            return
        self._surely("reset_prefix_cache", {})
        self._surely("update_weight_version", {"new_version": version})

    def _prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        answer = self._surely(
            "inference/v1/generate",
            {
                "token_ids": list(ids),
                "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0},
            },
        )
        return [
            answer["prompt_logprobs"][place][str(token)]["logprob"]
            for place, token in enumerate(ids)
            if place
        ]

    def _sync_client(self) -> _SyncClient:
        return _SyncClient(self)

    # --- HTTP ------------------------------------------------------------------------------------

    def _call(self, path: str, body: Mapping[str, object] | None) -> Any:
        """See `vllm_http.call`."""
        return call(self._http, self._url, path, body, self.params.vllm.timeout_seconds)

    def _surely(self, path: str, body: Mapping[str, object] | None) -> Any:
        """`_call`, with retries: for what may be done twice."""
        for wait in self._attempts():
            try:
                return self._call(path, body)
            except ServerLostError as error:
                wait.until_next(error, progress=False)
                self._revive()
        raise AssertionError("_attempts goes on until it raises")


class _SyncClient:
    """vLLM's VLLMWeightSyncClient over HTTP."""

    def __init__(self, server: VllmServer) -> None:
        self.server = server

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        self.server._call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.server._call("start_weight_update", {})

    def update_weights(self, update_info: object) -> None:
        self.server._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server._call("finish_weight_update", {"weight_version": weight_version})
