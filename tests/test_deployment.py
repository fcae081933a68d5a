"""Replicas through Ray: real Ray, real processes, the known-truth server in place of an engine."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, wait_for
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs ray: pip install -e '.[cluster]'", allow_module_level=True)

from cluster.actors import Failed, ReplicaActor, Started, choose_cpus
from cluster.deployment import CommandEngine, Deployment, connect, disconnect, resources, shortage
from cluster.load import LoadWorkers
from cluster.models import get_model
from cluster.tiers import get_tier
from harness import probe
from harness.errors import ServerError, UsageError
from harness.run import RunSpec, create_run_dir

TIER = get_tier("aws-m7a.large")
SERVER = (sys.executable, "-m", "cluster.fake_server", "--ttft", "0.01", "--host", "{host}", "--port", "{port}")
FAKE = CommandEngine(name="fake", served_model="fake", argv=SERVER, api_key_env="FAKE_SERVER_API_KEY")
BROKEN = CommandEngine(
    name="broken", served_model="fake", argv=("sh", "-c", "echo loading; echo 'no such weights' >&2; exit 3")
)


def deploy(tmp_path: Path, engine: CommandEngine = FAKE, replicas: int = 1, **options: Any) -> Deployment:
    return Deployment(
        model=get_model("smollm2-135m"), weights=tmp_path, tier=TIER, replicas=replicas, run_dir=tmp_path,
        api_key="secret", engine=engine, **options,
    )  # fmt: skip


def listeners(url: str) -> list[psutil.Process]:
    """Processes that serve this port."""
    port = url.split(":")[2].split("/")[0]
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if port in words and "cluster.fake_server" in words and "guard.py" not in " ".join(words):
            found.append(process)
    return found


# --- without Ray ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 256), st.integers(1, 16), st.integers(1, 16))
def test_cpus_are_the_tiers_and_shared_only_when_too_few(host: int, vcpu: int, count: int) -> None:
    given_out = [choose_cpus(range(host), vcpu, rank, count) for rank in range(count)]
    assert all(1 <= len(cpus) <= vcpu for cpus in given_out)
    flat = [cpu for cpus in given_out for cpu in cpus]
    assert set(flat) <= set(range(host))
    if host >= count:
        assert len(set(flat)) == len(flat), "no two replicas on one processor"
    if host >= count * vcpu:
        assert all(len(cpus) == vcpu for cpus in given_out)


def test_a_cluster_too_small_is_told_what_is_missing() -> None:
    need = resources(get_tier("aws-p5.48xlarge"))
    assert need == {"CPU": 0.05, "GPU": 8.0, "accelerator_type:H100": 0.001}
    h100 = {"CPU": 192.0, "GPU": 8.0, "accelerator_type:H100": 1.0, "memory": 1e12}
    half = {**h100, "GPU": 4.0}
    a100 = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0}
    assert shortage([h100, h100], need, 2) is None
    assert shortage([{"CPU": 1.0}], resources(TIER), 8) is None, "a CPU replica's actor asks for next to nothing"
    for nodes in ([h100, half, half], [h100, a100], [h100, {"CPU": 4.0}]):
        problem = shortage(nodes, need, 2)
        assert problem is not None
        assert "room for 1; each needs 8 GPU, 0.001 accelerator_type:H100 on one node" in problem
    assert "nodes: none" in (shortage([], need, 1) or "")


def test_no_replica_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--replicas 0"):
        deploy(tmp_path, replicas=0)


def make_actor(tmp_path: Path, engine: Any) -> ReplicaActor:
    return ReplicaActor(engine, "replica 0", str(tmp_path / "server-0.log"), "secret", True)


def test_an_actor_owns_its_server(tmp_path: Path) -> None:
    actor = make_actor(tmp_path, FAKE)
    started = actor.start(30, 2, 0, 1)
    assert isinstance(started, Started)
    assert started.cpus
    body = {"model": "fake", "prompt": [1], "max_tokens": 1}
    probe.fetch(f"{started.base_url}/completions", "secret", body)
    with pytest.raises(ServerError, match="401"):
        probe.fetch(f"{started.base_url}/completions", "wrong", body)
    assert actor.ended() is None
    assert listeners(started.base_url)
    actor.stop()
    assert not listeners(started.base_url)
    assert actor.ended() == "killed by SIGTERM"
    assert b"ready" in actor.log_bytes()


class FirstPortTaken(CommandEngine):
    """Like another process that was faster, once."""

    __slots__ = ()
    starts = 0

    def command(self, host: str, port: int, api_key: str) -> Any:
        FirstPortTaken.starts += 1
        if FirstPortTaken.starts == 1:
            return (
                type(self)
                .__mro__[1](name="x", served_model="fake", argv=("sh", "-c", "echo Address already in use; exit 1"))
                .command(host, port, api_key)
            )
        return super().command(host, port, api_key)


def test_a_port_taken_meanwhile_is_tried_again_elsewhere(tmp_path: Path) -> None:
    engine = FirstPortTaken(name="fake", served_model="fake", argv=SERVER, api_key_env="FAKE_SERVER_API_KEY")
    actor = make_actor(tmp_path, engine)
    started = actor.start(30, None, 0, 1)
    actor.stop()
    assert isinstance(started, Started)
    assert FirstPortTaken.starts == 2
    assert actor.messages() == ["its port was taken meanwhile; trying another one"]


def test_a_server_that_refuses_completions_is_not_waited_for(tmp_path: Path) -> None:
    engine = CommandEngine(name="fake", served_model="other name", argv=SERVER, api_key_env="FAKE_SERVER_API_KEY")
    start = time.monotonic()
    failed = make_actor(tmp_path, engine).start(60, None, 0, 1)
    assert isinstance(failed, Failed)
    assert "up but refuses a completion" in failed.message
    assert "other name" in failed.message
    assert time.monotonic() - start < 30


def test_a_stop_during_the_start_overtakes_it(tmp_path: Path) -> None:
    engine = CommandEngine(name="slow", served_model="fake", argv=("sleep", "600"))
    actor = make_actor(tmp_path, engine)
    results: list[Started | Failed] = []
    thread = threading.Thread(target=lambda: results.append(actor.start(600, None, 0, 1)))
    thread.start()
    time.sleep(0.5)
    actor.stop()
    thread.join(20)
    assert isinstance(results[0], Failed)


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    head = connect(print)
    assert head is not None
    yield
    disconnect(head)


@pytest.mark.ray
def test_replicas_live_and_die_in_the_open(tmp_path: Path, local_ray: None) -> None:
    said: list[str] = []
    with deploy(tmp_path, replicas=2, say=said.append) as d:
        urls = [replica.base_url for replica in d.replicas]
        assert len(set(urls)) == 2
        assert all(replica.ready_s is not None and replica.ready_s < 60 for replica in d.replicas)
        assert (d.engine, d.engine_version, d.shares_host, d.launch) == ("fake", "fake-1", True, None)
        assert d.engine_args == [sys.executable, "-m", "cluster.fake_server", "--ttft", "0.01", "--host", "--port"]
        assert [c and c["vllm:generation_tokens_total"] for c in d.counters()] == [1.0, 1.0], "the readiness request"
        assert d.check() == {}
        assert "replica 1 ready" in " ".join(said)

        (server,) = listeners(urls[0])
        server.kill()
        wait_for(lambda: 0 in d.check(), 15, "the death to be noticed")
        assert "killed by SIGKILL" in d.check()[0]
        assert d.replicas[0].exit is not None
        assert d.replicas[1].exit is None
        assert d.counters()[0] is None
    assert not listeners(urls[1])
    assert "ready" in (tmp_path / "server-1.log").read_text()
    d.stop()


@pytest.mark.ray
def test_a_server_that_dies_at_start_is_no_timeout(tmp_path: Path, local_ray: None) -> None:
    start = time.monotonic()
    with pytest.raises(ServerError) as caught, deploy(tmp_path, BROKEN, replicas=2):
        pass
    assert time.monotonic() - start < 60
    assert "ended before it was ready: exit code 3" in str(caught.value)
    assert "no such weights" in str(caught.value)
    assert "server-" in str(caught.value)


@pytest.mark.ray
def test_load_workers_run_on_the_cluster(tmp_path: Path, local_ray: None) -> None:
    from test_load import WORKER, exits, follow

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    run = create_run_dir(tmp_path, "t")
    with deploy(tmp_path) as d:
        d._load_nodes = d._nodes  # on one host they would be children of this process
        spec = RunSpec(mode="open", model="m", base_urls=["u"], workers=2, extra_body={"act": "crash"})
        with LoadWorkers(spec, run, api_key="k", launch=d.launch, worker=(sys.executable, str(script))) as load:
            load.start()
            counts = follow(load)
    assert counts["done"] == 11
    assert exits(load) == ["exit code 1: worker blew up", None]
    assert "key" in run.worker_log(1).read_text()


@pytest.mark.ray
def test_killing_the_driver_leaves_nothing(tmp_path: Path) -> None:
    driver = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from test_deployment import deploy
        with deploy(Path({str(tmp_path)!r})) as d:
            print(d.replicas[0].base_url, flush=True)
            time.sleep(600)
    """)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert listeners(url)
        tree = psutil.Process(process.pid).children(recursive=True)
        assert len(tree) > 8, "Ray, its actor, guards, the server"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)

    def left() -> list[psutil.Process]:
        return [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    wait_for(lambda: not left(), 15, "server, guards and all of Ray ended")
