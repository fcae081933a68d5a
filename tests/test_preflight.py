"""What starting servers needs is looked at before anything is fetched."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from conftest import harness

from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.deploy import placement
from harness.cluster.process import registry
from harness.errors import HarnessError, UsageError

TRACE = Path(__file__).resolve().parent.parent / "scenarios" / "traces" / "azure-conv-2023.csv"
CPU, GPU = get_tier("aws-m7a.large"), get_tier("aws-p5.48xlarge")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_client_only_install_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install .*\[cpu\].*--base-url"):
        placement.check_can_serve(CPU)


def test_vllm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "distributions", lambda name: [])
    with pytest.raises(HarnessError, match=r"pip install .*\[cpu\]"):
        placement.check_can_serve(CPU)
    monkeypatch.setattr(placement, "visible_gpus", lambda: [str(i) for i in range(8)])
    with pytest.raises(HarnessError, match=r"pip install .*\[gpu\]"):
        placement.check_can_serve(GPU)


def test_a_gpu_tier_without_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "visible_gpus", lambda: ["0"])
    with pytest.raises(HarnessError, match=r"8 x H100.*offers 1 NVIDIA GPU:.*RAY_ADDRESS"):
        placement.check_can_serve(GPU)


def test_accelerators_are_those_that_the_driver_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver, devices = tmp_path / "proc", tmp_path / "dev"
    devices.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (devices / name).touch()
    monkeypatch.setattr(registry, "NVIDIA", driver)
    monkeypatch.setattr(registry, "DEVICES", devices)
    assert registry.visible_gpus() == ["0", "1"], "a sandbox without /proc/driver"
    (driver / "0000:01:00.0").mkdir(parents=True)
    assert registry.visible_gpus() == ["0"]
    for said, found in (("", []), ("-1", []), ("3,1", ["3", "1"]), ("GPU-a,MIG-b", ["GPU-a", "MIG-b"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert registry.visible_gpus() == found


def test_an_old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cpu_flags", lambda: {"sse4_2"})
    monkeypatch.setattr(placement.platform, "machine", lambda: "x86_64")
    with pytest.raises(HarnessError, match="AVX2"):
        placement.check_can_serve(CPU)


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{s.getsockname()[1]}")
        with pytest.raises(HarnessError, match="nothing answers there"):
            placement.check_can_serve(GPU)
        s.listen()
        placement.check_can_serve(GPU)


@pytest.mark.parametrize("address", ["ray://head:10001", "local", "http://head:8265"])
def test_an_address_of_another_kind(address: str) -> None:
    with pytest.raises(UsageError, match="HOST:6379"):
        placement.check_ray_address(address)


def test_nothing_is_fetched_or_made_before(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
        done = harness(
            "replay", TRACE, "--out", tmp_path / "runs", RAY_ADDRESS=address, HARNESS_CACHE=str(tmp_path / "cache")
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"harness: Ray cluster {address}")
    assert list(tmp_path.iterdir()) == [], "no weights, no prompts, no run directory"
