"""What `harness doctor` says of this machine's accelerators: what the driver shows, and whether vLLM can use them."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

from harness.install import install_command

FIELDS = "name,memory.total,memory.used,driver_version"
TAKEN = 0.1
"""vLLM takes nine tenths of an accelerator's memory and does not start where others hold more than the rest."""


def look_at_gpus(vllm: str | None) -> tuple[str, str | None, str | None]:
    """(found, what is missing or null, what limits or null) with this vLLM installed, or none."""
    engine = f"vllm {vllm}" if vllm else "vllm is not installed"
    rows = [row for line in _ask(f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits").splitlines()
            if len(row := [cell.strip() for cell in line.split(",")]) == len(FIELDS.split(","))]  # fmt: skip
    if not rows:
        missing = "GPU tiers need a machine or Ray cluster that has them"
        return f"{engine}; no NVIDIA GPU (nvidia-smi does not answer)", missing, None
    found = f"{engine}; " + "; ".join(f"{name}, {_number(total) / 1024:.0f} GiB" for name, total, *_ in rows)
    if vllm is None:
        return found, install_command("gpu"), None
    built, driver = torch_cuda(), _driver_cuda()
    found += f"; driver {rows[0][3]}" + (f" for CUDA {driver}" if driver else "")
    if built is None:
        return found, "the installed torch is not built for CUDA: install the build that this vLLM pins", None
    if driver and _version(driver) < _version(built)[:1]:  # minor versions of one major are compatible
        return (
            found,
            f"torch is built for CUDA {built}: install a newer driver, or a vLLM built for CUDA {driver}",
            None,
        )
    held = [f"{name}: {_number(used) / 1024:.0f} GiB" for name, total, used, _ in rows
            if _number(used) > TAKEN * _number(total) > 0]  # fmt: skip
    if held:
        return (
            found,
            None,
            f"memory is in use ({'; '.join(held)}): end what holds it (nvidia-smi), or vLLM will not start",
        )
    try:
        metadata.version("nvidia-ml-py")
    except metadata.PackageNotFoundError:
        return found, None, "no GPU counters are recorded: pip install nvidia-ml-py"
    return found, None, None


def torch_cuda() -> str | None:
    """CUDA that the installed torch is built for, without importing it; null: none, or no torch."""
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    match = re.search(r"^cuda[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _driver_cuda() -> str | None:
    """Newest CUDA that the driver takes; null when it does not say."""
    match = re.search(r"CUDA Version\s*:\s*(\d+\.\d+)", _ask())
    return match[1] if match else None


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _number(text: str) -> float:
    """A cell in MiB; 0 where the driver has none ([N/A])."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)
