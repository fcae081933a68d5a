"""Many machines: Ray, servers and load workers on hosts with addresses of their own, one of them lost in mid-run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, wait_for
from hosts.network import HostOnBridge, hosts, why_not

from harness.record.manifest import RunDir, read_manifest
from harness.record.results import read_results
from harness.record.samples import read_server_processor

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs ray: pip install -e '.[cluster]'", allow_module_level=True)
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

FAKE = "harness.cluster.engines.fake.server"
"""A server, in the command line of its process."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PORT = 6379
TIMING = {"lag", "generator_lag", "generator_cpu", "arrival_process", "littles_law", "starved"}
"""Gates that three hosts on two cores may fail: they are about speed, the tests here are not."""
LOSS_S = 60.0
"""A run that lost a host ends this long after its plan at the latest (or after the loss, when it is stopped)."""


@dataclass
class Cluster:
    """A Ray head, which is also the driver's host, and two nodes."""

    hosts: list[HostOnBridge]
    folder: Path
    env: dict[str, str]

    @property
    def out(self) -> Path:
        """Runs, on the driver's host alone."""
        return self.folder / "out"

    def start_ray(self, index: int) -> None:
        host, ray = self.hosts[index], [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        role = ["--head", f"--port={PORT}", f"--temp-dir={self.folder}/ray", "--include-dashboard=false"]
        if index:
            # Ray believes what it is told of accelerators: enough to see where a GPU replica would go.
            gpus = ["--num-gpus=8", "--resources", '{"accelerator_type:H100": 1}', f"--memory={2 << 40}"]
            role = [f"--address={self.hosts[0].address}:{PORT}", *gpus]
        size = ["--num-cpus=2", f"--object-store-memory={80 << 20}", f"--node-ip-address={host.address}"]
        host.start([*ray, *role, *size], env=self.env, log=self.folder / f"ray-{index}.log")

    def has_nodes(self, count: int, deadline_s: float) -> None:
        """Wait until Ray has that many nodes; one process asks until then, since to start it costs more than to ask."""
        code = (
            "import ray, time; ray.init('auto', log_to_driver=False)\n"
            f"while sum(n['Alive'] for n in ray.nodes()) != {count}: time.sleep(0.1)"
        )
        argv = ["ip", "netns", "exec", self.hosts[0].name, sys.executable, "-c", code]
        end = time.monotonic() + deadline_s

        def asked() -> bool:
            left = max(1.0, end - time.monotonic())
            done = subprocess.run(argv, env=self.driver_env(), capture_output=True, timeout=left, check=False)
            return done.returncode == 0

        wait_for(asked, deadline_s, f"Ray has {count} nodes")

    def driver_env(self, **more: str) -> dict[str, str]:
        address = f"{self.hosts[0].address}:{PORT}"
        return {**self.env, "RAY_ADDRESS": address, **more}

    def replay(self, requests: int, rate: float, *options: str, **env: str) -> Drive:
        """Start a replay of that many requests on the cluster."""
        out = self.out / secrets.token_hex(3)
        out.mkdir()
        trace = out / "trace.jsonl"
        lines = [{"arrival_s": i / rate, "input_tokens": 20, "output_tokens": 20} for i in range(requests)]
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
        argv = [
            sys.executable, "-m", "hosts.driver", "replay", trace, "--out", out, "--format", "json", "--workers", "2",
            *options,
        ]  # fmt: skip
        process = self.hosts[0].start(argv, env=self.driver_env(**env), log=out / "stdout")
        return Drive(process, out)


@dataclass
class Drive:
    """A command line that is running on the driver's host."""

    process: subprocess.Popen[bytes]
    out: Path

    @property
    def run(self) -> Path:
        (run,) = (p for p in self.out.iterdir() if p.is_dir())
        return run

    def rows(self, worker: int) -> int:
        """Rows of a worker that are in the run directory by now."""
        files = list(self.out.glob(f"*/results-{worker}.arrows"))
        return sum(read_results(file).num_rows for file in files if file.stat().st_size)

    def said(self) -> str:
        """Its words, not its report."""
        return self.text().partition("\n{")[0]

    def text(self) -> str:
        return (self.out / "stdout").read_text(errors="replace")

    def end(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout_s:.0f} s:\n{self.said()}") from None

    def report(self) -> dict[str, Any]:
        text = self.text()
        found: dict[str, Any] = json.JSONDecoder().raw_decode(text[text.index("\n{") + 1 :])[0]
        return found


def noticing() -> dict[str, str]:
    """What cluster/README.md has machines set: to notice that they are cut off, and to let servers run at nice 0."""
    return dict(re.findall(r"(RAY_[gw]\w+)=(\d+)", (ROOT / "cluster" / "README.md").read_text()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not in pytest's folder: under `pytest -n` that is too long for the path of Ray's sockets, 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as name:
        yield from cluster_in(Path(name))


def cluster_in(folder: Path) -> Iterator[Cluster]:
    (folder / "out").mkdir()
    (folder / "ray").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "HARNESS_"))}
    env |= {
        **noticing(),
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "XDG_STATE_HOME": str(folder / "state"), "HARNESS_CACHE": str(folder / "cache"),
        "PYTHONPATH": f"{ROOT}/tests:{ROOT}",
    }  # fmt: skip
    with hosts(3) as made:
        for node in made[1:]:
            # Nodes do not see the driver's run directory, and Ray's sockets would clash.
            node.private = [folder / "out", folder / "ray"]
        cluster = Cluster(made, folder, env)
        for index in range(3):
            cluster.start_ray(index)
            if not index:
                cluster.has_nodes(1, 60)
        cluster.has_nodes(3, 60)
        yield cluster


def harness_processes(host: HostOnBridge) -> list[str]:
    """Servers, load workers and guards on a host."""
    found = []
    for process in host.processes():
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(name in words for name in (FAKE, "harness.scenarios.worker", "guard.py")):
            found.append(words[:200])
    return found


def test_servers_and_load_on_different_hosts(cluster: Cluster) -> None:
    drive = cluster.replay(60, 10.0)
    key_seen: list[str] = []
    wait_for(lambda: drive.rows(1) > 5 or drive.process.poll() is not None, 90, "rows from another host")
    assert drive.process.poll() is None, drive.said()
    server_hosts = [i for i, h in enumerate(cluster.hosts) if any(FAKE in p for p in harness_processes(h))]
    load_hosts = [
        i for i, h in enumerate(cluster.hosts) if any("harness.scenarios.worker" in p for p in harness_processes(h))
    ]
    assert len(server_hosts) == 1
    assert len(load_hosts) == 2
    assert not set(server_hosts) & set(load_hosts)
    assert 0 not in server_hosts, "the driver's own host carries servers last"

    # No secret in a command line, and in the environment only of who needs it.
    servers = [
        p
        for h in cluster.hosts
        for p in h.processes()
        if "harness.cluster.engines.fake.server" in " ".join(p.cmdline())
    ]
    key = next(p.environ()["FAKE_SERVER_API_KEY"] for p in servers if "FAKE_SERVER_API_KEY" in p.environ())
    token = cluster.env["RAY_AUTH_TOKEN"]
    for process in psutil.process_iter():
        try:
            words, environment = " ".join(process.cmdline()), process.environ()
        except psutil.Error:
            continue
        assert key not in words
        assert token not in words
        if key in environment.values():
            key_seen.append(words)
        if FAKE in words or "harness.scenarios.worker" in words:
            assert token not in environment.values(), words
    assert key_seen and all(FAKE in words or "harness.scenarios.worker" in words for words in key_seen), key_seen

    assert drive.end(90) in (0, 3), drive.said()
    report = drive.report()
    failed = {check["name"] for check in report["checks"] if check["gate"] and check["ok"] is False}
    assert failed <= TIMING, report["reasons"]
    assert report["requests"]["succeeded"] == 60
    manifest = read_manifest(drive.run)
    assert manifest.load_shares_server_host is False
    assert {w.host for w in manifest.workers} > {cluster.hosts[max(load_hosts)].address}
    assert [w.rows for w in manifest.workers] == [drive.rows(0), drive.rows(1)]
    assert manifest.replicas[0].base_url.startswith(f"http://{cluster.hosts[server_hosts[0]].address}:")
    assert "ready http" in (drive.run / "server-0.log").read_text(), "the log of a server elsewhere came home"
    assert manifest.replicas[0].nice == os.getpriority(os.PRIO_PROCESS, 0), "as cluster/README.md has Ray started"
    times = read_server_processor(RunDir(drive.run).server_processor(0)).to_pylist()
    assert manifest.end_ns is not None
    assert sum(row["length_ns"] for row in times if 0 <= row["t_ns"] <= manifest.end_ns) > 0.5 * manifest.end_ns
    assert next(c for c in report["checks"] if c["name"] == "starved")["gate"], "what it waited was read"
    for file in drive.run.rglob("*"):
        if file.is_file():
            assert key.encode() not in file.read_bytes(), file
    for host in cluster.hosts:
        wait_for(lambda host=host: not harness_processes(host), 120, "nothing left")


@pytest.mark.parametrize(("replicas", "parts"), [(2, 1), (1, 2)])
def test_accelerators_are_taken_whole_from_one_node_and_parts_of_a_replica_from_several(
    cluster: Cluster, replicas: int, parts: int
) -> None:
    options = ["--tier", "aws-p5.48xlarge", "--replicas", str(replicas)]
    drive = cluster.replay(60, 10.0, *options, TEST_ENGINE="vllm", TEST_PARTS=str(parts))
    wait_for(lambda: drive.rows(0) > 0 or drive.process.poll() is not None, 90, "rows")
    assert drive.process.poll() is None, drive.said()
    assert not any(FAKE in p for p in harness_processes(cluster.hosts[0])), "no accelerators there"
    for host in cluster.hosts[1:]:
        servers = [p for p in host.processes() if p.cmdline()[1:3] == ["-m", "harness.cluster.engines.fake.server"]]
        assert len(servers) == 1, "each node has what one replica, or one part of it, takes whole"
        assert servers[0].environ()["CUDA_VISIBLE_DEVICES"].count(",") == 7
    assert drive.end(90) in (0, 3), drive.said()
    manifest = read_manifest(drive.run)
    assert len({r.base_url for r in manifest.replicas}) == replicas
    assert [r.exit for r in manifest.replicas] == [None] * replicas
    for host in cluster.hosts:
        wait_for(lambda host=host: not harness_processes(host), 120, "nothing left")


def test_parts_that_find_their_meeting_port_taken_meet_at_another(cluster: Cluster, tmp_path: Path) -> None:
    clash = tmp_path / "clash"
    drive = cluster.replay(
        40, 10.0, "--tier", "aws-p5.48xlarge", TEST_ENGINE="vllm", TEST_PARTS="2", TEST_CLASH=str(clash)
    )
    assert drive.end(90) in (0, 3), drive.said()
    assert clash.exists()
    assert "replica 0: a port its parts meet at was taken meanwhile; trying another one" in drive.said()
    assert drive.report()["requests"]["succeeded"] == 40
    for host in cluster.hosts:
        wait_for(lambda host=host: not harness_processes(host), 120, "nothing left")


def test_a_tier_that_is_not_there_is_said_at_once_node_by_node(cluster: Cluster) -> None:
    drive = cluster.replay(10, 10.0, "--tier", "aws-p5.48xlarge", "--replicas", "3")
    assert drive.end(60) == 1
    said = drive.said()
    assert "3 x aws-p5.48xlarge: the Ray cluster has room for 2; each needs 1024.0 GiB of memory, 8 GPU, H100" in said
    assert f"{cluster.hosts[0].address}: 2 CPU" in said
    assert "starting" not in said


def test_a_host_with_a_load_worker_is_cut_off(cluster: Cluster) -> None:
    drive = cluster.replay(300, 20.0)
    wait_for(lambda: drive.rows(1) > 20 or drive.process.poll() is not None, 90, "rows from another host")
    assert drive.process.poll() is None, drive.said()
    victim = next(h for h in cluster.hosts[1:] if any("harness.scenarios.worker" in p for p in harness_processes(h)))
    victim.cut()
    before = drive.rows(1)
    try:
        assert drive.end(15 + LOSS_S) == 3, drive.said()
        report = drive.report()
        assert report["verdict"] == "INVALID"
        assert any("worker 1: lost: host" in reason for reason in report["reasons"]), report["reasons"]
        manifest = read_manifest(drive.run)
        assert manifest.workers[0].exit is None
        assert drive.rows(0) == 150, "the other worker's rows are whole"
        assert before <= drive.rows(1) < 150
        # A host that nobody can reach ends what runs on it by itself.
        wait_for(lambda: not harness_processes(victim), 120, "the cut host cleaned up")
    finally:
        victim.kill()
        victim.join()
        cluster.start_ray(cluster.hosts.index(victim))
        cluster.has_nodes(3, 90)


def test_the_host_of_a_server_dies(cluster: Cluster) -> None:
    """It does not come back: what follows makes do with two hosts."""
    drive = cluster.replay(300, 20.0, "--stall", "5s")
    wait_for(lambda: drive.rows(1) > 20 or drive.process.poll() is not None, 90, "rows")
    assert drive.process.poll() is None, drive.said()
    victim = next(h for h in cluster.hosts[1:] if any(FAKE in p for p in harness_processes(h)))
    victim.kill()
    assert drive.end(15 + LOSS_S) == 3, drive.said()
    report = drive.report()
    assert report["verdict"] == "INVALID"
    manifest = read_manifest(drive.run)
    assert manifest.replicas[0].exit is not None
    assert "its host" in manifest.replicas[0].exit
    assert drive.rows(0) + drive.rows(1) == 300, "a row for every request, sent or not"
    assert "ready http" in (drive.run / "server-0.log").read_text(), "what it had logged till then"
    for host in cluster.hosts:
        wait_for(lambda host=host: not harness_processes(host), 120, "nothing left")


def test_the_head_of_the_cluster_dies(cluster: Cluster) -> None:
    """The last test here: the cluster does not come back from it."""
    cluster.has_nodes(sum(bool(host.processes()) for host in cluster.hosts), 90)
    drive = cluster.replay(900, 20.0)  # until long after the driver notices
    wait_for(lambda: drive.rows(1) > 20 or drive.process.poll() is not None, 90, "rows")
    assert drive.process.poll() is None, drive.said()
    (head,) = (p for p in cluster.hosts[0].processes() if p.name() == "gcs_server")
    head.kill()
    assert drive.end(15 + LOSS_S) == 3, drive.said()
    assert drive.report()["verdict"] == "INVALID", "Ray would have ended the driver without one"
    assert read_manifest(drive.run).status == "stopped"
    assert drive.rows(0) > 0
    for host in cluster.hosts:
        wait_for(lambda host=host: not harness_processes(host), 120, "nothing left")
