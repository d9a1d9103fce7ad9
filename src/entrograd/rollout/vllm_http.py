"""HTTP to a vLLM server: one request, and the waiting between attempts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from entrograd.errors import InputError
from entrograd.rollout.engine import EngineError
from entrograd.rollout.params import VllmParams

log = logging.getLogger("entrograd")

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the first retry; doubled up to the longest
ABSENT = (
    "it is served by `vllm serve --enable-scale-out` with VLLM_SERVER_DEV_MODE=1 (docs/vllm.md has "
    "the whole command)"
)


class ServerLostError(Exception):
    """The server did not answer, or answered that it cannot now: worth another attempt."""


def session(params: VllmParams) -> requests.Session:
    """Connections for `concurrency` requests at a time, with the server's key, if there is one."""
    opened = requests.Session()
    opened.trust_env = params.url is not None  # no proxy between us and loopback
    adapter = HTTPAdapter(pool_maxsize=params.concurrency)
    for scheme in ("http://", "https://"):
        opened.mount(scheme, adapter)
    if key := os.environ.get("VLLM_API_KEY"):
        opened.headers["Authorization"] = f"Bearer {key}"
    return opened


def call(
    session: requests.Session,
    server: str,
    path: str,
    body: Mapping[str, Any] | None,
    seconds: float,
) -> Any:
    """The JSON answer of `server` to a POST of `body` to `path` (a GET if None), waited for at
    most `seconds`.

    Raises ServerLostError if trying again may help; InputError or EngineError, with the server's
    own words, if it cannot.
    """
    url = f"{server}/{path}"
    try:
        answer = session.request(
            "GET" if body is None else "POST", url, json=body, timeout=(10, seconds)
        )
    except requests.RequestException as error:
        raise ServerLostError(f"{type(error).__name__} at /{path}") from None
    if answer.status_code >= 500 or answer.status_code == 429:
        raise ServerLostError(f"status {answer.status_code} at /{path}: {answer.text[:200]}")
    if answer.status_code == 401:
        raise InputError(f"{url}: status 401; set VLLM_API_KEY to the server's key")
    if answer.status_code in (403, 404):
        raise InputError(f"{url}: status {answer.status_code}; {ABSENT}")
    if answer.status_code >= 400:
        raise EngineError(f"{url}: status {answer.status_code}: {answer.text[:500]}")
    try:
        return answer.json() if answer.content else {}
    except requests.JSONDecodeError:
        raise ServerLostError(f"an answer that is not JSON at /{path}") from None


class Wait:
    """Waiting that doubles while nothing comes back; EngineError after `retries` in a row."""

    def __init__(self, retries: int, what: str) -> None:
        self.retries, self.what = retries, what
        self.failed, self.seconds = 0, FIRST_WAIT

    def until_next(self, lost: Exception, progress: bool) -> None:
        """Sleep before the next attempt."""
        if progress:
            self.failed, self.seconds = 0, FIRST_WAIT
        self.failed += 1
        if self.failed > self.retries:
            raise EngineError(
                f"{self.what}: lost ({lost}), and {self.retries} more attempts brought nothing; "
                "start it again (finished work is kept) or raise execution.rollout.vllm.retries"
            )
        log.warning("%s: lost (%s); next attempt in %.1f s", self.what, lost, self.seconds)
        time.sleep(self.seconds)
        self.seconds = min(2 * self.seconds, LONGEST_WAIT)
