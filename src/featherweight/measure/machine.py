# SPDX-License-Identifier: Apache-2.0
"""The machine that the numbers are of: without it a latency is worth nothing. Reads files; starts no process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from featherweight.processor import processor_flags, processor_name

__all__ = ["machine_facts"]

# What decides how fast matrix kernels can be: vector width, and dot products of bytes or bfloat16.
_FLAGS_X86 = "avx2 fma avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16"
_FLAGS_ARM = "asimd asimddp i8mm bf16 sve sve2"
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "featherweight", "featherweight-engine")


def machine_facts() -> dict[str, Any]:
    """CPU, the instruction sets that matter, cores, clock governor, memory, operating system and versions; JSON-able.

    What cannot be read is None. `cores` are those that this process may run on, `cpu_quota` is a container's limit in
    cores, `memory_bytes` is the machine's.

    >>> facts = machine_facts()
    >>> facts["cores"] >= 1, "torch" in facts["versions"]
    (True, True)
    """
    flags = processor_flags()
    return {
        "cpu": processor_name(),
        "flags": [flag for flag in f"{_FLAGS_X86} {_FLAGS_ARM}".split() if flag in flags],
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_quota": _quota(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": _memory(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _quota() -> float | None:
    limit, _, period = (_read("/sys/fs/cgroup/cpu.max") or "").partition(" ")
    return round(int(limit) / int(period), 2) if limit.isdigit() and period.isdigit() else None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
