"""The host's own counters: on the run's clock, null where there is nothing to measure, whole after any end."""

from __future__ import annotations

import inspect
import sys
import time
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import wait_for

from harness.cluster.catalogue.tiers import CATALOGUE, check_accelerators, read_tiers
from harness.errors import ResultsError, ServerError
from harness.record import samples
from harness.record.host import Gpus, busy_share
from harness.record.samples import HOST_SCHEMA, HostMetrics, host_file, read_host_metrics


def test_samples_on_the_runs_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "EVERY_S", 0.1)
    file = tmp_path / "host-a.arrows"
    start = time.time_ns() + 10_000_000_000
    with HostMetrics(file, start) as metrics:
        wait_for(
            lambda: file.exists() and file.stat().st_size > 0 and read_host_metrics(file).num_rows >= 3, 10, "rows"
        )
    assert metrics.trouble is None
    table = read_host_metrics(file)
    stamps = table.column("t_ns").to_pylist()
    assert stamps == sorted(stamps)
    assert -10_000_000_000 < stamps[0] < -5_000_000_000, "before the common start is negative"
    row = table.to_pylist()[-1]
    assert 0 <= row["cpu_share"] <= 1
    assert row["cpu_count"] == psutil.cpu_count()
    assert 0 < row["memory_used_bytes"] < row["memory_bytes"]
    assert row["net_sent_bytes"] >= 0


def test_a_busy_processor_shows() -> None:
    before, end = psutil.cpu_times(), time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    share = busy_share(before, psutil.cpu_times())
    assert share is not None
    assert share > 0.5 / (psutil.cpu_count() or 1)
    assert busy_share(before, before) is None


class NvmlError(Exception):
    """As pynvml's."""


def fake_nvml(**changes: Any) -> types.ModuleType:
    """Two cards, the second of which does not tell its power."""
    module = types.ModuleType("pynvml")

    def power(handle: int) -> int:
        if handle:
            raise NvmlError
        return 312_500

    members: dict[str, Any] = {
        "NVMLError": NvmlError, "NVML_TEMPERATURE_GPU": 0, "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetUtilizationRates": lambda h: types.SimpleNamespace(gpu=50 + h),
        "nvmlDeviceGetMemoryInfo": lambda h: types.SimpleNamespace(used=2**30 * (h + 1), total=80 * 2**30),
        "nvmlDeviceGetPowerUsage": power, "nvmlDeviceGetTemperature": lambda h, kind: 60 + h,
    }  # fmt: skip
    module.__dict__.update(members | changes)
    return module


def test_accelerators_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert Gpus().sample() == {
        "gpu_util": [0.5, 0.51], "gpu_memory_bytes": [2**30, 2**31], "gpu_power_w": [312.5, None],
        "gpu_temperature_c": [60.0, 61.0],
    }  # fmt: skip


def test_accelerators_of_another_size_are_not_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = read_tiers(CATALOGUE)
    wants_40, wants_80 = tiers["aws-p4d.24xlarge"], tiers["aws-p4de.24xlarge"]
    assert wants_40.accelerator == wants_80.accelerator, "so Ray takes one for the other"
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    check_accelerators(wants_80)
    check_accelerators(tiers["aws-m7a.large"])
    with pytest.raises(ServerError, match=r"have 80 GiB each, those of tier aws-p4d.24xlarge 40"):
        check_accelerators(wants_40)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=no_driver))
    check_accelerators(wants_40)


def test_nvml_itself_has_what_the_fake_has() -> None:
    """Ray's own copy of the library: nvidia-ml-py is installed only with accelerators."""
    found = pytest.importorskip("ray._private.thirdparty.pynvml")
    for name, member in vars(fake_nvml()).items():
        if name.startswith("nvml"):
            inspect.signature(getattr(found, name)).bind(*inspect.signature(member).parameters)
    assert issubclass(found.NVMLError, Exception)
    assert found.NVML_TEMPERATURE_GPU == 0
    fields = {name for name, _ in found.c_nvmlMemory_t._fields_}
    assert {"total", "used"} <= fields
    assert "gpu" in {name for name, _ in found.c_nvmlUtilization_t._fields_}


def no_driver() -> None:
    raise NvmlError("Driver Not Loaded")


def rows_of(file: Path) -> int:
    """How many are there so far."""
    try:
        return int(read_host_metrics(file).num_rows)
    except ResultsError:
        return 0


@pytest.mark.parametrize("module", [None, fake_nvml(nvmlInit=no_driver)])
def test_no_accelerator_is_null(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert set(Gpus().sample().values()) == {None}
    monkeypatch.setattr(samples, "EVERY_S", 0.05)
    file = host_file(tmp_path, "local")
    with HostMetrics(file, time.time_ns()):
        wait_for(lambda: rows_of(file) > 0, 120, "a row")
    assert set(read_host_metrics(file).column("gpu_util").to_pylist()) == {None}


def test_a_torn_file_keeps_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "EVERY_S", 0.05)
    file = host_file(tmp_path, "10.0.0.1/../x")
    assert file.parent == tmp_path, "an address is no path"
    with HostMetrics(file, time.time_ns()):
        wait_for(lambda: rows_of(file) > 3, 120, "some rows")
    whole = read_host_metrics(file).num_rows
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) * 2 // 3])
    assert 0 < read_host_metrics(file).num_rows < whole
    file.write_bytes(b"")
    assert read_host_metrics(file).num_rows == 0
    file.write_bytes(b"something else entirely")
    with pytest.raises(ResultsError, match="not a file of host metrics"):
        read_host_metrics(file)
    with pytest.raises(ResultsError, match="no such file"):
        read_host_metrics(tmp_path / "none")


def test_a_full_disk_is_told_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(samples, "EVERY_S", 0.05)
    with HostMetrics(Path("/dev/full"), time.time_ns()) as metrics:
        wait_for(lambda: metrics.trouble is not None, 120, "it is told")
    assert metrics.trouble is not None
    assert "cannot write" in metrics.trouble
    assert HOST_SCHEMA.metadata[b"harness.host_metrics"] == b"1"
