"""A vLLM server of our own on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import requests
from transformers import AutoConfig

from entrograd.pipeline.parent import end_with_parent
from entrograd.rollout.engine import EngineError
from entrograd.rollout.params import RolloutParams
from entrograd.rollout.vllm_settings import engine_arguments, environment, flags_of


class ManagedServer:
    """A server of our own on loopback: a child in a session of its own, gone when we are."""

    def __init__(self, params: RolloutParams, weights: Path, tokenizer: Path) -> None:
        config = AutoConfig.from_pretrained(weights, local_files_only=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(weights), "--tokenizer", str(tokenizer.absolute())),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--data-parallel-size", str(params.vllm.data_parallel_size)),
                *flags_of(engine_arguments(params, config.max_position_embeddings)),
                *("--enable-scale-out", "--disable-uvicorn-access-log"),
            ],
            env={**os.environ, **environment(params), "VLLM_SERVER_DEV_MODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),
        )

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def wait_until_ready(self, http: requests.Session, seconds: float) -> None:
        """EngineError where it ends or is not ready in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.alive():
                raise EngineError(
                    f"vLLM's server does not start: {self.last_words()}; memory is set by "
                    "execution.rollout.vllm.kv_cache_gib and gpu_memory_utilization"
                )
            with contextlib.suppress(requests.RequestException):
                if http.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.25)
        self.stop()
        raise EngineError(
            f"vLLM's server is not ready after {seconds:g} s: {self.last_words()}; raise "
            "execution.rollout.vllm.start_seconds"
        )

    def last_words(self) -> str:
        """The last error of its log, or the last line."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[-1][:500]

    def stop(self) -> None:
        """End it and what it started."""
        for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self._log.flush()
