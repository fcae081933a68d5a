"""What doctor says of accelerators: a fake nvidia-smi and a fake torch in place of the driver's and the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli import gpus
from harness.cli.gpus import look_at_gpus, torch_cuda

H200 = "NVIDIA H200, 143771, 4, 580.159.04"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with an H200 and a torch for CUDA 13; a test may write others."""
    write_smi(tmp_path, H200, "13.0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    write_torch(tmp_path, "cuda: Optional[str] = '13.0'")
    monkeypatch.setattr(gpus.metadata, "distribution", lambda name: Folder(tmp_path))
    monkeypatch.setattr(gpus.metadata, "version", lambda name: "13.0")
    return tmp_path


class Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def locate_file(self, name: str) -> Path:
        return self._path / name


def write_smi(folder: Path, rows: str, cuda: str | None) -> None:
    """As driver 580 prints it: rows for a query, else its table."""
    table = "| NVIDIA-SMI 580.159.04  Driver Version: 580.159.04" + (f"  CUDA Version: {cuda} |" if cuda else " |")
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\ncase $1 in --query*) printf '%s\\n' '{rows}';; *) echo '{table}';; esac\n")
    path.chmod(0o755)


def write_torch(folder: Path, line: str) -> None:
    (folder / "torch").mkdir(exist_ok=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\nhip: Optional[str] = None\n")


def test_a_host_that_can(host: Path) -> None:
    found, missing, limit = look_at_gpus("0.26.0")
    assert found == "vllm 0.26.0; NVIDIA H200, 140 GiB; driver 580.159.04 for CUDA 13.0"
    assert (missing, limit) == (None, None)


def test_an_engine_that_is_not_there(host: Path) -> None:
    found, missing, _ = look_at_gpus(None)
    assert found == "vllm is not installed; NVIDIA H200, 140 GiB"
    assert missing and "[gpu]" in missing


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "exec sleep 0"])
def test_no_accelerator(host: Path, script: str) -> None:
    (host / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    found, missing, _ = look_at_gpus("0.26.0")
    assert found == "vllm 0.26.0; no NVIDIA GPU (nvidia-smi does not answer)"
    assert missing == "GPU tiers need a machine or Ray cluster that has them"


@pytest.mark.parametrize(
    ("driver", "torch", "words"),
    [
        ("12.8", "cuda: Optional[str] = '13.0'", "torch is built for CUDA 13.0: install a newer driver"),
        ("13.0", "cuda: Optional[str] = None", "not built for CUDA: install the build that this vLLM pins"),
        ("12.4", "cuda: Optional[str] = '12.8'", None),
        (None, "cuda = '13.0'", None),
        ("13.1", "cuda = '12.8'", None),
    ],
)
def test_torch_and_driver(host: Path, driver: str | None, torch: str, words: str | None) -> None:
    write_smi(host, H200, driver)
    write_torch(host, torch)
    _, missing, _ = look_at_gpus("0.26.0")
    assert (words is None) == (missing is None)
    assert words is None or words in str(missing)


def test_memory_that_others_hold_is_said(host: Path) -> None:
    """One row with what a partitioned card or a sandbox has no figure of."""
    write_smi(host, f"{H200}\nNVIDIA H200, 143771, 71000, 580.159.04\nNVIDIA H200, [N/A], [N/A], 580.159.04", "13.0")
    found, missing, limit = look_at_gpus("0.26.0")
    assert found.startswith("vllm 0.26.0; NVIDIA H200, 140 GiB; NVIDIA H200, 140 GiB; NVIDIA H200, 0 GiB")
    assert missing is None
    assert limit == "memory is in use (NVIDIA H200: 69 GiB): end what holds it (nvidia-smi), or vLLM will not start"


def test_counters_need_their_package(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise gpus.metadata.PackageNotFoundError

    monkeypatch.setattr(gpus.metadata, "version", absent)
    assert look_at_gpus("0.26.0")[2] == "no GPU counters are recorded: pip install nvidia-ml-py"
    monkeypatch.setattr(gpus.metadata, "distribution", absent)
    assert torch_cuda() is None
