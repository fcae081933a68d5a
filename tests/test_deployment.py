"""Replicas through Ray: real Ray, real processes, the known-truth server in place of an engine."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, gone, wait_for

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs ray: pip install -e '.[cluster]'", allow_module_level=True)

from harness.cli.runner import targets
from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.deploy import servers
from harness.cluster.deploy.deployment import Deployment
from harness.cluster.deploy.load_workers import LoadWorkers
from harness.cluster.deploy.ray_session import connect, disconnect
from harness.cluster.deploy.remote import HOST_FILE, RemoteHost, Report
from harness.cluster.deploy.servers import Failed, Look, ReplicaOwner, Started, hold_port
from harness.cluster.deploy.supervisor import MOST_RESTARTS, PartOwner, ServerHost, Supervisor
from harness.cluster.engines.protocol import WHOLE, Command, CommandEngine, Part
from harness.cluster.process.process import Process
from harness.errors import ServerError, UsageError
from harness.record.manifest import Restart, RunDir, create_run_dir
from harness.record.run_spec import RunSpec
from harness.record.samples import ProcessorSecond, host_file, read_host_metrics, read_server_processor
from harness.server import counters, probe

S = 1_000_000_000
TIER = get_tier("aws-m7a.large")
SERVER = (
    sys.executable,
    "-m",
    "harness.cluster.engines.fake.server",
    "--ttft",
    "0.01",
    "--host",
    "{host}",
    "--port",
    "{port}",
)
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
        if port in words and "harness.cluster.engines.fake.server" in words and "guard.py" not in " ".join(words):
            found.append(process)
    return found


# --- without Ray ------------------------------------------------------------------------------------------------------


def test_no_replica_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--replicas 0"):
        deploy(tmp_path, replicas=0)


def make_owner(tmp_path: Path, engine: Any) -> ReplicaOwner:
    return ReplicaOwner(engine, "replica 0", str(tmp_path / "server-0.log"), "secret", "127.0.0.1")


def test_an_actor_owns_its_server(tmp_path: Path) -> None:
    owner = make_owner(tmp_path, FAKE)
    started = owner.start(30)
    assert isinstance(started, Started)
    body = {"model": "fake", "prompt": [1], "max_tokens": 1}
    probe.fetch(f"{started.base_url}/completions", "secret", body)
    with pytest.raises(ServerError, match="401"):
        probe.fetch(f"{started.base_url}/completions", "wrong", body)
    assert owner.ended() is None
    assert listeners(started.base_url)
    owner.stop()
    assert not listeners(started.base_url)
    assert owner.ended() == "killed by SIGTERM"
    look = owner.look()
    assert (look.ended, look.state, look.log) == ("killed by SIGTERM", "ready", b""), "the driver reads the log itself"
    assert "ready" in (tmp_path / "server-0.log").read_text()


class FirstPortTaken(CommandEngine):
    """Like another process that was faster, once."""

    __slots__ = ()
    starts = 0

    def command(self, host: str, port: int, api_key: str, part: Part = WHOLE) -> Command:
        FirstPortTaken.starts += 1
        if FirstPortTaken.starts == 1:
            return Command(argv=["sh", "-c", "echo Address already in use; exit 1"], env={})
        return CommandEngine.command(self, host, port, api_key, part)


def test_a_port_taken_meanwhile_is_tried_again_elsewhere(tmp_path: Path) -> None:
    engine = FirstPortTaken(name="fake", served_model="fake", argv=SERVER, api_key_env="FAKE_SERVER_API_KEY")
    owner = make_owner(tmp_path, engine)
    started = owner.start(30)
    owner.stop()
    assert isinstance(started, Started)
    assert FirstPortTaken.starts == 2
    assert owner.look().messages == ["its port was taken meanwhile; trying another one"]


def test_a_server_that_refuses_completions_is_not_waited_for(tmp_path: Path) -> None:
    engine = CommandEngine(name="fake", served_model="other name", argv=SERVER, api_key_env="FAKE_SERVER_API_KEY")
    start = time.monotonic()
    failed = make_owner(tmp_path, engine).start(600)
    assert isinstance(failed, Failed)
    assert "up but refuses a completion" in failed.message
    assert "other name" in failed.message
    assert time.monotonic() - start < 250, "it is not waited for"


def test_a_stop_during_the_start_overtakes_it(tmp_path: Path) -> None:
    engine = CommandEngine(name="slow", served_model="fake", argv=("sleep", "600"))
    owner = make_owner(tmp_path, engine)
    results: list[Started | Failed] = []
    thread = threading.Thread(target=lambda: results.append(owner.start(600)))
    thread.start()
    time.sleep(0.5)
    owner.stop()
    thread.join(120)
    assert isinstance(results[0], Failed)


class Looking(CommandEngine):
    """Looks at its owner while it is started."""

    __slots__ = ()
    looks: list[Look] = []  # noqa: RUF012 - read by the test
    owner: ReplicaOwner

    def command(self, host: str, port: int, api_key: str, part: Part = WHOLE) -> Command:
        Looking.looks.append(Looking.owner.look())
        return CommandEngine.command(self, host, port, api_key, part)


def test_the_death_before_a_restart_is_never_told_as_one_of_the_new_start(tmp_path: Path) -> None:
    engine = Looking(name="fake", served_model="fake", argv=SERVER, api_key_env="FAKE_SERVER_API_KEY")
    owner = Looking.owner = make_owner(tmp_path, engine)
    started = owner.start(30)
    assert isinstance(started, Started)
    listeners(started.base_url)[0].kill()
    wait_for(lambda: owner.ended() is not None, 120, "the death")
    assert isinstance(owner.restart(30), Started)
    between, after = Looking.looks[1], owner.look()
    owner.stop()
    assert (between.start, between.ended is not None) == (1, True)
    assert (after.start, after.ended) == (2, None)


class Talking(CommandEngine):
    """Says in its log what it does."""

    __slots__ = ()

    def state(self, line: str) -> str | None:
        return line.removeprefix("now ") if line.startswith("now ") else None


def test_the_states_of_a_start_are_read_from_the_log(tmp_path: Path) -> None:
    steps = "echo now loading; sleep 1; echo noise; echo now compiling; sleep 1; exec " + " ".join(SERVER)
    engine = Talking(name="t", served_model="fake", argv=("sh", "-c", steps), api_key_env="FAKE_SERVER_API_KEY")
    owner = make_owner(tmp_path, engine)
    assert owner.look().state == "queued"
    thread = threading.Thread(target=lambda: owner.start(30))
    thread.start()
    seen: list[str] = []

    def look() -> bool:
        state = owner.look().state
        if seen[-1:] != [state]:
            seen.append(state)
        return state == "ready"

    wait_for(look, 120, "ready")
    thread.join(120)
    owner.stop()
    assert [s for s in seen if s not in ("queued", "starting")] == ["loading", "compiling", "ready"]


def test_a_server_that_runs_and_does_not_answer_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEALTH_EVERY_S": 0.1, "HEALTH_ANSWER_S": 0.2, "UNHEALTHY_S": 0.5}.items():
        monkeypatch.setattr(f"harness.cluster.deploy.servers.{name}", value)
    owner = make_owner(tmp_path, FAKE)
    started = owner.start(30)
    assert isinstance(started, Started)
    (server,) = listeners(started.base_url)
    server.suspend()
    wait_for(lambda: owner.ended() is not None, 120, "its silence to be noticed")
    assert "/health has failed for" in (owner.ended() or "")
    server.resume()
    wait_for(lambda: owner.ended() is None, 120, "it answers again")
    owner.stop()


LATE = """
import http.server, pathlib, sys, time
class Late(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if pathlib.Path(sys.argv[1]).exists():
            time.sleep(0.4)
        self.answer()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()
    def answer(self):
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Late).serve_forever()
"""


def test_a_busy_server_that_answers_health_late_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEALTH_EVERY_S", "HEALTH_ANSWER_S", "UNHEALTHY_S"):
        monkeypatch.setattr(servers, name, getattr(servers, name) / 20)  # 0.4 s stands for 8 s
    argv = (sys.executable, "-c", LATE, str(tmp_path / "busy"), "{port}")
    owner = make_owner(tmp_path, CommandEngine(name="late", served_model="late", argv=argv))
    assert isinstance(owner.start(30), Started)
    (tmp_path / "busy").touch()
    until = time.monotonic() + 2 * servers.UNHEALTHY_S
    while time.monotonic() < until:
        assert owner.ended() is None
        time.sleep(0.1)
    owner.stop()


def test_a_port_is_given_to_nobody_else_while_it_is_held(tmp_path: Path) -> None:
    with hold_port("127.0.0.1") as held, socket.socket() as other, socket.socket() as server:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(held.getsockname())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as vLLM does
        server.bind(held.getsockname())
        server.listen()
    owner = make_owner(tmp_path, FAKE)
    started = owner.start(30)
    assert isinstance(started, Started)
    held = owner._held["server"]
    assert f":{held.getsockname()[1]}/" in started.base_url
    owner.stop()
    assert held.fileno() == -1


def test_a_late_word_of_the_old_death_does_not_kill_the_restarted_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answers:
        """A question that is answered with these, in turn."""

        lost = None

        def __init__(self, *looks: Look | None) -> None:
            self.looks = list(looks)

        def send(self) -> None:
            return None

        def answer(self) -> list[Look] | None:
            look = self.looks.pop(0)
            return None if look is None else [look]

    monkeypatch.setattr("harness.cluster.deploy.supervisor.ask", lambda refs, timeout_s: [Started("http://x/v1", 1.0)])
    monkeypatch.setattr("harness.cluster.deploy.supervisor.head_gone", lambda: False)
    monkeypatch.setattr("harness.cluster.deploy.supervisor.ray.wait", lambda refs, **_: (refs, []))
    d = deploy(tmp_path, on_replica_death="restart")
    watch, host = d._supervisor, ServerHost(None, node="n")
    host.owners = [PartOwner(host, 0, 0, 0, tmp_path / "log", ended="killed by SIGKILL", start=2)]
    late, new = Look("ready", [], "killed by SIGKILL", b"", 1), Look("ready", [], None, b"", 2)
    host.question = Answers(None, late, new, Look("ready", [], "exit code 1", b"", 2))  # type: ignore[assignment]
    watch.hosts, watch.owners = [host], host.owners
    watch.restarts.append(Restart(replica=0, died="then", how="killed by SIGKILL"))
    watch._restarting[0] = None, 0, time.monotonic()
    assert d.check() == {}
    assert d.restarts[0].ready is not None
    assert d.check() == {}, "a word of the death that is known"
    assert d.check() == {}
    assert (len(d.restarts), d.restarting) == (1, False)
    watch._restart_wanted = False
    assert d.check() == {0: "exit code 1"}, "and of a new one"


def test_a_server_that_goes_on_dying_is_not_started_again_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        """Every look finds that the start which counts has died."""

        lost = None

        def send(self) -> None:
            return None

        def answer(self) -> list[Look]:
            return [Look("ready", [], "exit code 1", b"", host.owners[0].start)]

    class Actor:
        restart = property(lambda self: self)

        def remote(self, place: int, ready_s: float) -> None:
            return None

    monkeypatch.setattr("harness.cluster.deploy.supervisor.ask", lambda refs, timeout_s: [Started("http://x/v1", 1.0)])
    monkeypatch.setattr("harness.cluster.deploy.supervisor.head_gone", lambda: False)
    monkeypatch.setattr("harness.cluster.deploy.supervisor.ray.wait", lambda refs, **_: (refs, []))
    d = deploy(tmp_path, on_replica_death="restart")
    host = ServerHost(Actor(), node="n")
    host.owners = [PartOwner(host, 0, 0, 0, tmp_path / "log")]
    host.question = Dying()  # type: ignore[assignment]
    d._supervisor.hosts, d._supervisor.owners = [host], host.owners
    for _ in range(50):
        if died := d.check():
            break
    assert died == {0: "exit code 1"}
    assert len(d.restarts) == MOST_RESTARTS


def test_servers_of_a_cluster_without_a_head_are_lost_and_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [True, False, True, True]
    monkeypatch.setattr("harness.cluster.deploy.supervisor.head_gone", lambda: gone.pop(0))
    clock = iter(range(0, 1000, 10))
    d = deploy(tmp_path, on_replica_death="restart")
    d._supervisor.owners = [PartOwner(ServerHost(None), 0, 0, 0, tmp_path / "log")]
    monkeypatch.setattr("harness.cluster.deploy.supervisor.time.monotonic", lambda: next(clock))
    assert d.check() == {}
    assert d.check() == {}, "it was back before the time was over"
    assert d.check() == {}
    assert d.check() == {0: "the head of its Ray cluster has not answered for 15 s"}
    assert d.restarts == []


def test_host_counters_that_cannot_be_written_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with targets.sample_here(RunDir(tmp_path / "gone"), time.time_ns()):
        pass
    assert "host metrics: " in capsys.readouterr().err


def test_counters_of_a_host_that_do_not_fit_on_the_disk_end_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start of a piece may have got onto it: the same piece once more would be read as nonsense."""

    class Pieces:
        lost = None

        def send(self) -> None:
            return None

        def answer(self) -> Report:
            return Report(None, [], {HOST_FILE: b"x" * 100})

    host, file = RemoteHost.__new__(RemoteHost), tmp_path / "host.arrows"
    host.trouble, host._offsets, host._question = None, {HOST_FILE: 0}, Pieces()  # type: ignore[assignment]
    host._files = {HOST_FILE: Path("/dev/full")}
    assert host.fetch()
    host._files = {HOST_FILE: file}  # there is room again
    assert not host.fetch()
    assert not file.exists()


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "local"])
def test_a_ray_address_that_cannot_be_used_is_refused_with_what_to_give(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match="HOST:6379"):
        connect(print)


def test_an_empty_ray_address_is_none_and_our_own_ray_has_its_token() -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"RAY_ADDRESS": ""}
    shown = "print(len(os.environ['RAY_AUTH_TOKEN']), os.environ['RAY_AUTH_MODE'])"
    code = f"import harness.cluster.deploy.ray_session, os; {shown}"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert said.stdout.split() == ["64", "token"], said.stderr


def test_a_part_of_a_server_is_started_without_being_asked_for_answers(tmp_path: Path) -> None:
    engine = CommandEngine(name="part", served_model="fake", argv=("sleep", "600"))
    owner = make_owner(tmp_path, engine)
    host, port = owner.meeting_point()
    started = owner.start(30, Part(rank=1, hosts=2, master=host, master_port=port))
    assert isinstance(started, Started)
    assert owner.ended() is None
    owner.stop()
    assert owner.ended() is not None


# --- with Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Process]:
    handler = signal.getsignal(signal.SIGTERM)
    head = connect(print)
    assert head is not None
    assert signal.getsignal(signal.SIGTERM) is handler, "Ray's own would abort the driver in the middle of a start"
    yield head
    disconnect(head)


@pytest.mark.ray
def test_a_ray_of_our_own_listens_on_loopback_alone(local_ray: Process) -> None:
    family = [psutil.Process(local_ray.pid), *psutil.Process(local_ray.pid).children(recursive=True)]
    on = {c.laddr.ip for one in family for c in one.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert on
    assert all(ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in on), on


@pytest.mark.ray
def test_replicas_live_and_die_in_the_open(tmp_path: Path, local_ray: None) -> None:
    said: list[str] = []
    with deploy(tmp_path, replicas=2, say=said.append) as d:
        urls = [replica.base_url for replica in d.replicas]
        assert len(set(urls)) == 2
        assert all(replica.ready_s is not None and replica.ready_s < 60 for replica in d.replicas)
        assert (d.engine, d.engine_version, d.shares_host, d.launch) == ("fake", "fake-1", True, None)
        assert d.engine_args == [
            sys.executable,
            "-m",
            "harness.cluster.engines.fake.server",
            "--ttft",
            "0.01",
            "--host",
            "--port",
        ]
        found = [counters.counters(r.base_url, d.api_key) for r in d.replicas]
        assert [c and c["vllm:generation_tokens_total"] for c in found] == [1.0, 1.0], "the readiness request"
        assert d.check() == {}
        assert "replica 1 ready" in " ".join(said)

        (server,) = listeners(urls[0])
        server.kill()
        wait_for(lambda: 0 in d.check(), 120, "the death to be noticed")
        assert "killed by SIGKILL" in d.check()[0]
        assert d.replicas[0].exit is not None
        assert d.replicas[1].exit is None
        assert counters.counters(d.replicas[0].base_url, d.api_key) is None
    assert not listeners(urls[1])
    assert "ready" in (tmp_path / "server-1.log").read_text()
    d.stop()


@pytest.mark.ray
def test_a_server_that_dies_at_start_is_no_timeout(tmp_path: Path, local_ray: None) -> None:
    start = time.monotonic()
    with pytest.raises(ServerError) as caught, deploy(tmp_path, BROKEN, replicas=2):
        pass
    assert time.monotonic() - start < 250
    assert "ended before it was ready: exit code 3" in str(caught.value)
    assert "no such weights" in str(caught.value)
    assert "server-" in str(caught.value)


@pytest.mark.ray
def test_a_dead_replica_is_started_again_at_its_address_and_the_run_is_marked(tmp_path: Path, local_ray: None) -> None:
    said: list[str] = []
    with deploy(tmp_path, replicas=2, say=said.append, on_replica_death="restart") as d:
        url = d.replicas[0].base_url
        before = counters.counters(d.replicas[0].base_url, d.api_key)
        (server,) = listeners(url)
        server.kill()
        wait_for(lambda: d.check() == {} and bool(d.restarts), 120, "the death")
        assert "killed by SIGKILL" in d.restarts[0].how, "noted at once, also when the run ends before it is up again"
        wait_for(lambda: d.check() == {} and d.restarts[0].ready is not None, 120, "the restart")
        (restart,) = d.restarts
        assert (restart.replica, (restart.took_s or 99) < 30) == (0, True)
        assert restart.died <= (restart.ready or "")
        assert d.replicas[0].exit is None
        assert d.replicas[0].base_url == url
        after = counters.counters(d.replicas[0].base_url, d.api_key)
        assert before is not None
        assert after is not None
        assert after["process_start_time_seconds"] > before["process_start_time_seconds"], "which the verdict sees"
        assert d.check() == {}
    assert "answers again" in " ".join(said)
    assert not listeners(url)


@pytest.mark.ray
def test_a_replica_that_cannot_be_started_again_is_dead(tmp_path: Path, local_ray: None) -> None:
    once = f"[ -e {tmp_path}/flag ] && exit 4; touch {tmp_path}/flag; exec {' '.join(SERVER)}"
    engine = CommandEngine(name="once", served_model="fake", argv=("sh", "-c", once), api_key_env="FAKE_SERVER_API_KEY")
    with deploy(tmp_path, engine, on_replica_death="restart") as d:
        (server,) = listeners(d.replicas[0].base_url)
        server.kill()
        wait_for(lambda: 0 in d.check(), 120, "the failure")
        assert "killed by SIGKILL" in d.check()[0]
        assert "not started again: replica 0 ended before it was ready: exit code 4" in d.check()[0]
        assert [r.ready for r in d.restarts] == [None]


@pytest.mark.ray
def test_hardware_that_is_not_there_is_said_before_anything_starts(tmp_path: Path, local_ray: None) -> None:
    begin = time.monotonic()
    tier = get_tier("aws-p5.48xlarge")
    model, said = get_model("smollm2-135m"), list[str]()
    with (
        pytest.raises(ServerError) as caught,
        Deployment(
            model=model, weights=tmp_path, tier=tier, replicas=2, run_dir=tmp_path, api_key="secret", engine=FAKE,
            say=said.append,
        ),
    ):  # fmt: skip
        pass
    assert time.monotonic() - begin < 120
    assert "2 x aws-p5.48xlarge: the Ray cluster has room for 0; each needs" in str(caught.value)
    assert "no H100" in str(caught.value)
    assert said == []


@pytest.mark.ray
def test_the_counters_of_the_host_are_sampled(tmp_path: Path, local_ray: None) -> None:
    run = create_run_dir(tmp_path, "t")
    with deploy(tmp_path) as d, d.sample_hosts(run, time.time_ns()):
        wait_for(lambda: host_file(run.path, "local").exists(), 120, "the file")
        time.sleep(1.5)
    assert read_host_metrics(host_file(run.path, "local")).num_rows >= 1


@pytest.mark.ray
def test_the_processor_times_of_every_server_come_home(tmp_path: Path, local_ray: Process) -> None:
    """For each run on the same servers, at the nice value of this process: Ray's own choice is 15 more."""
    runs = [create_run_dir(tmp_path, name) for name in ("a", "b")]
    body, own = {"model": "fake", "prompt": [1], "max_tokens": 20}, os.getpriority(os.PRIO_PROCESS, 0)
    with deploy(tmp_path, replicas=2) as d:
        assert [r.nice for r in d.replicas] == [own, own]
        actors = [p for p in psutil.Process(local_ray.pid).children(recursive=True) if "ServersActor" in p.cmdline()[0]]
        assert actors and {p.nice() for p in actors} == {own}, "also where a server could not be given another"
        for run in runs:
            with d.sample_hosts(run, time.time_ns()):
                for one in d.replicas:
                    probe.fetch(f"{one.base_url}/completions", "secret", body)
                time.sleep(1.2)
                assert d.check() == {}
        idle = create_run_dir(tmp_path, "idle")
        d._supervisor.listen(1.0)
    for run in runs:
        for index in range(2):
            rows = read_server_processor(run.server_processor(index)).to_pylist()
            assert 1 <= len(rows) <= 10
            assert -1 * S < rows[0]["t_ns"] - rows[0]["length_ns"] < rows[-1]["t_ns"] < 20 * S
            assert all(row["threads"] >= 1 and row["run_ns"] >= 0 and row["delay_ns"] >= 0 for row in rows)
            assert sum(row["run_ns"] for row in rows) > 0
    assert list(idle.path.iterdir()) == []


class Answer:
    """What an actor's method answers, at once."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.remote = answer


def test_a_server_elsewhere_is_sampled_on_its_own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is an hour ahead. Others do not answer, and no file can be made in the end: neither stops anything."""
    from ray.exceptions import RayError

    begun: list[int] = []
    rows = [ProcessorSecond(t_ns=S, length_ns=S, threads=9, run_ns=500, delay_ns=50, work_run_ns=0, work_delay_ns=0)]
    looks = [[Look("ready", [], None, b"", 1, rows)], [Look("ready", [], None, b"", 1, [])]]

    def ahead() -> int:
        return time.time_ns() + 3_600 * S

    actor = types.SimpleNamespace(
        clock_ns=Answer(ahead), sample=Answer(begun.append), end_samples=Answer(lambda: None),
        look=Answer(lambda offsets: looks.pop(0) if len(looks) > 1 else looks[0]),
    )  # fmt: skip

    def gone() -> int:
        raise RayError("gone")

    def get(ref: Any, timeout: float) -> Any:
        return ref

    monkeypatch.setattr("harness.cluster.deploy.supervisor.ray.get", get)
    monkeypatch.setattr("harness.cluster.deploy.supervisor.ray.wait", lambda refs, **options: (refs, []))
    said: list[str] = []
    watch = Supervisor([], said.append, restart=False, ready_s=1)
    hosts = [
        ServerHost(actor, node="a"),
        ServerHost(types.SimpleNamespace(clock_ns=Answer(gone)), node="b"),
        ServerHost(None),
    ]
    for index, host in enumerate(hosts):
        host.owners = [PartOwner(host, 0, index, 0, tmp_path / "log")]
    watch.hosts, watch.owners = hosts[:1], [o for host in hosts for o in host.owners]
    run = create_run_dir(tmp_path, "t")
    watch.hosts = hosts
    start = time.time_ns()
    with watch.sampling(run, start):
        watch.hosts = hosts[:1]
        watch.listen()
    assert abs(begun[0] - start - 3_600 * S) < S
    assert read_server_processor(run.server_processor(0)).column("run_ns").to_pylist() == [500]
    assert sorted(p.name for p in run.path.glob("server-processor-*")) == ["server-processor-0.arrows"]
    assert said == []
    looks.insert(0, [Look("ready", [], None, b"", 1, rows)])
    with watch.sampling(RunDir(tmp_path / "gone"), start):
        watch.listen()
    assert len(said) == 1 and "server-processor-0.arrows: cannot write" in said[0]


@pytest.mark.ray
def test_load_workers_run_on_the_cluster(tmp_path: Path, local_ray: None) -> None:
    from test_load import WORKER, exits, follow

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    run = create_run_dir(tmp_path, "t")
    run.plan.write_bytes(b"a plan")
    with deploy(tmp_path) as d:
        # On one host they would be children of this process.
        d._load_nodes = [replace(node, here=False) for node in d._nodes]
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
        process.wait(120)

    wait_for(lambda: all(gone(p) for p in tree), 120, "server, guards and all of Ray ended")


@pytest.mark.ray
def test_the_end_of_our_own_ray_does_not_end_the_driver(tmp_path: Path) -> None:
    """Ray ends a process that asks it anything for a minute after its end: then there would be no verdict."""
    driver = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from conftest import wait_for
        from test_deployment import deploy
        with deploy(Path({str(tmp_path)!r})) as d:
            d._ray.kill()
            wait_for(lambda: 0 in d.check(), 120, "the death")
        print("verdict", flush=True)
    """)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-c", driver], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "verdict\n"), ran.stderr
