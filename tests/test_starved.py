"""A server that was short of processor has no price: the kernel's count, how it comes home, and the gate on it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
from run_files import MS, S, good, write_processor, write_run

from harness.analysis.check import Check
from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.analysis.validity.servers import OWN_WAIT, STARVED_BOUND
from harness.cluster.deploy.servers import ReplicaOwner, Started
from harness.cluster.engines.protocol import CommandEngine, Part
from harness.cluster.process import cpu_times as schedstat
from harness.cluster.process.cpu_times import CpuTimesSampler, HostTimes, Meter, Times, read_threads
from harness.errors import ResultsError
from harness.record.manifest import Replica, RunDir
from harness.record.samples import ProcessorSecond, ProcessorSeconds, read_server_processor

REPLICA = Replica(index=0, base_url="http://127.0.0.1:1/v1", nice=0)
LENGTH_S = 40
QUIET = {"run_ns": 1_840 * MS, "delay_ns": 203 * MS, "work_run_ns": 1_800 * MS, "work_delay_ns": 124 * MS}
"""A second of `make replay` on two idle cores, as it was measured."""
BUSY = {"run_ns": 1_010 * MS, "delay_ns": 1_320 * MS, "work_run_ns": 980 * MS, "work_delay_ns": 980 * MS}
"""The same with a busy loop on each core, which takes half of it from either engine thread."""


def second(t_s: float, length_s: float = 1.0, **facts: Any) -> ProcessorSecond:
    if "run_ns" in facts or "delay_ns" in facts:  # all of it of threads with work, unless said otherwise
        facts = {f"work_{name}": facts[name] for name in ("run_ns", "delay_ns") if name in facts} | facts
    known = {"threads": 73, "host_busy_ns": 1_900 * MS, "host_stolen_ns": 0, **QUIET, **facts}
    return ProcessorSecond(t_ns=round(t_s * S), length_ns=round(length_s * S), **known)


def seconds(n: int = LENGTH_S, **facts: Any) -> list[ProcessorSecond]:
    return [second(k + 1, **facts) for k in range(n)]


def judged(tmp_path: Path, rows: list[ProcessorSecond] | None, **options: Any) -> tuple[Summary, Check]:
    """A run of 40 s, and what is said of its server."""
    results = [good(i, i * S, ttft_ms=400, itl_ms=200) for i in range(LENGTH_S)]
    path = write_run(tmp_path / "run", results, **({"replicas": [REPLICA]} | options))
    RunDir(path).server_processor(0).unlink(missing_ok=True)
    if rows is not None:
        write_processor(RunDir(path).server_processor(0), rows)
    s = summarise(read_run(path))
    return s, next(c for c in s.checks if c.name == "starved")


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_quiet_replay_is_valid(tmp_path: Path) -> None:
    s, said = judged(tmp_path, seconds())
    assert (said.ok, said.gate, s.verdict) == (True, True, "VALID")
    assert "waited 7% of the" in said.observed
    assert s.cost.usd_per_1m_total.value is not None


def test_beside_a_busy_loop_on_each_core_it_is_invalid_and_has_no_price(tmp_path: Path) -> None:
    s, said = judged(tmp_path, seconds(**BUSY))
    assert (said.ok, said.gate, s.verdict) == (False, True, "INVALID")
    assert s.cost.usd_per_1m_total.value is None
    assert "waited 100% of the" in said.observed and "(100% behind other threads, 0% stolen" in said.observed
    assert "other work ran on its processors" in (said.advice or "")
    assert "run again (server-processor-0.arrows says when)" in (said.advice or "")
    assert "nice" not in (said.advice or "")


@pytest.mark.parametrize(("share", "ok"), [(OWN_WAIT + STARVED_BOUND - 0.01, True), (0.18, False)])
def test_a_tenth_of_its_processor_time_beyond_its_own_waits_is_the_most(tmp_path: Path, share: float, ok: bool) -> None:
    assert judged(tmp_path, seconds(delay_ns=round(share * 1_800 * MS)))[1].ok is ok


def test_the_window_alone_counts(tmp_path: Path) -> None:
    """Start-up, warm-up of the machine and whatever ran before and after wait as they like."""
    around = [*(second(-k, **BUSY) for k in (3, 2, 1, 0)), *seconds(41), *(second(42 + k, **BUSY) for k in range(30))]
    assert judged(tmp_path, around)[1].ok is True


def test_a_row_counts_as_far_as_it_lies_in_the_window(tmp_path: Path) -> None:
    """One row of 80 s, of which the run was the first half."""
    s, said = judged(tmp_path, [second(80, 80, run_ns=100 * S, delay_ns=10 * S)])
    assert said.ok is True and f"of the {50 * s.window.duration_s / 40:.1f} s" in said.observed  # type: ignore[union-attr]


def test_what_the_host_of_a_virtual_machine_takes_counts_like_a_wait(tmp_path: Path) -> None:
    # 0.4 of 2 s are taken from the machine, on which the server does nearly all the work
    s, said = judged(
        tmp_path, seconds(run_ns=1_500 * MS, delay_ns=100 * MS, host_busy_ns=1_550 * MS, host_stolen_ns=400 * MS)
    )
    assert (said.ok, s.verdict) == (False, "INVALID")
    assert "7% behind other threads, 26% stolen" in said.observed
    assert "measure on one whose processors are its own" in (said.advice or "")
    # of what is taken from a machine on which others do nearly all the work it has little
    other = seconds(run_ns=150 * MS, delay_ns=10 * MS, host_busy_ns=1_550 * MS, host_stolen_ns=100 * MS)
    assert judged(tmp_path / "other", other)[1].ok is True
    unknown = seconds(host_busy_ns=None, host_stolen_ns=None)
    assert judged(tmp_path / "unknown", unknown)[1].ok is True


def test_waits_that_can_slow_nothing_are_none_however_idle_the_server_is(tmp_path: Path) -> None:
    """Threads that wake up a hundred times a second for nothing wait for longer than they run."""
    polls = {"run_ns": 84 * MS, "delay_ns": 134 * MS}  # measured: a server without a request
    _, said = judged(tmp_path / "idle", seconds(**polls, work_run_ns=0, work_delay_ns=0))
    assert said.ok is True and said.observed == "replica 0 waited 0% of the 0.0 s it ran"
    assert judged(tmp_path / "one", seconds(run_ns=5 * MS, delay_ns=9 * MS))[1].ok is True
    assert judged(tmp_path / "more", seconds(run_ns=20 * MS, delay_ns=36 * MS))[1].ok is False


@pytest.mark.parametrize(
    "rows", [None, [], seconds(10), seconds(run_ns=0, delay_ns=0), seconds(run_ns=-5, work_run_ns=5)]
)
def test_what_is_not_known_is_a_limit(tmp_path: Path, rows: list[ProcessorSecond] | None) -> None:
    """No file, an empty one, one that ends after a quarter of the run, a kernel that does not count, nonsense."""
    s, said = judged(tmp_path, rows)
    assert (said.ok, said.gate, s.verdict) == (False, False, "VALID")
    assert said.observed == "not checked: the processor times of replica 0 are not known"
    assert said.advice and s.cost.usd_per_1m_total.value is not None


def test_a_file_of_something_else_is_a_limit(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [good(i) for i in range(40)], replicas=[REPLICA])
    RunDir(path).server_processor(0).write_bytes(b"nothing of ours")
    (said,) = (c for c in summarise(read_run(path)).checks if c.name == "starved")
    assert (said.ok, said.gate) == (False, False)


def test_a_server_that_was_there_is_not_checked(tmp_path: Path) -> None:
    s, said = judged(tmp_path, None, engine="url")
    assert (said.ok, said.gate, s.verdict) == (False, False, "VALID")
    assert "not checked: the server was not started by us" in said.observed and said.advice


def test_a_second_in_which_it_was_started_again_is_not_there(tmp_path: Path) -> None:
    """It died after 10 s and answered again after 20: half a minute is known."""
    there = [s for s in seconds() if not 10 * S < s.t_ns <= 20 * S]
    assert judged(tmp_path, there)[1].ok is True
    assert judged(tmp_path / "busy", [replace(s, **BUSY) for s in there])[1].ok is False


def test_the_worst_server_and_the_worst_part_decide(tmp_path: Path) -> None:
    def said(name: str, **files: list[ProcessorSecond]) -> Check:
        results = [good(i, i * S) for i in range(LENGTH_S)]
        run = RunDir(write_run(tmp_path / name, results, replicas=[REPLICA, replace(REPLICA, index=10, nice=15)]))
        for file in run.path.glob("server-processor-*"):
            file.unlink()
        for file, rows in files.items():
            write_processor(run.path / f"server-processor-{file[1:].replace('_', '-')}.arrows", rows)
        return next(c for c in summarise(read_run(run.path)).checks if c.name == "starved")

    assert said("both", _0=seconds(), _10=seconds()).ok is True
    second_one = said("one", _0=seconds(), _10=seconds(**BUSY))
    assert second_one.ok is False and "replica 10 waited" in second_one.observed
    assert "it ran at nice 15: start its Ray with RAY_worker_niceness=0" in (second_one.advice or "")
    assert "replica 0 waited" in said("part", _0=seconds(), _0_part_1=seconds(**BUSY), _10=seconds()).observed
    missing = said("missing", _0=seconds())
    assert (missing.ok, missing.gate) == (False, False) and "replica 10 are not known" in missing.observed
    assert said("known", _0=seconds(**BUSY)).gate, "what is known of one server is enough to refuse"


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_up_to_a_tear(tmp_path: Path) -> None:
    file = tmp_path / "server-processor-0.arrows"
    writer = ProcessorSeconds(file)
    writer.write(seconds(2))
    writer.write([])
    writer.write([second(3, host_busy_ns=None, host_stolen_ns=None)])
    whole = file.read_bytes()
    writer.close()
    assert read_server_processor(file).to_pylist()[2]["host_stolen_ns"] is None
    file.write_bytes(whole[:-20])
    assert read_server_processor(file).column("t_ns").to_pylist() == [S, 2 * S]
    file.write_bytes(b"")
    assert read_server_processor(file).num_rows == 0
    with pytest.raises(ResultsError, match="no such file"):
        read_server_processor(tmp_path / "none")
    write_run(tmp_path / "run", [good(0)])
    with pytest.raises(ResultsError, match="processor time schema"):
        read_server_processor(RunDir(tmp_path / "run").results(0))


@pytest.mark.parametrize("path", [Path("/dev/full"), Path("/nowhere/at/all")])
def test_a_full_disk_stops_no_run(path: Path) -> None:
    writer = ProcessorSeconds(path)
    for k in range(50):
        writer.write([second(k)])
    writer.close()
    assert writer.trouble is not None and writer.trouble.startswith(f"{path}: cannot write")


# --- the kernel's count -----------------------------------------------------------------------------------------------


def test_threads_come_and_go() -> None:
    meter = Meter()

    def take(root: int, threads: dict[int, Times]) -> tuple[int, int] | None:
        used = meter.take(root, threads, 100)
        return used and used[:2]

    assert take(7, {7: Times(100, 10), 8: Times(50, 5)}) is None, "the first reading is of all time before"
    assert take(7, {7: Times(130, 15), 8: Times(50, 5)}) == (30, 5)
    assert take(7, {7: Times(140, 15)}) == (10, 0), "one ended: its last moments are not known"
    assert take(7, {7: Times(140, 15), 9: Times(20, 2)}) == (20, 2), "one began"
    assert take(7, {7: Times(140, 15), 9: Times(3, 1)}) == (3, 1), "its number was given to another"
    assert take(70, {70: Times(9_000, 900)}) is None, "another process: what its start-up waited is no load's"
    assert take(70, {70: Times(9_001, 900)}) == (1, 0)
    meter.forget()
    assert take(70, {70: Times(9_500, 990)}) is None


def test_threads_that_ran_or_waited_for_a_tenth_of_the_time_have_work() -> None:
    meter = Meter()
    threads = {k: Times(0, 0) for k in range(4)}
    meter.take(0, threads, 1000)
    now = {0: Times(600, 40), 1: Times(5, 95), 2: Times(1, 98), 3: Times(60, 30)}  # 1: starved; 2 and 3: below a tenth
    assert meter.take(0, now, 1000) == (666, 263, 605, 135)


class Serving:
    """A server of planted readings."""

    def __init__(self, *pids: int) -> None:
        self.pids, self.rows = list(pids), list[ProcessorSecond]()

    def processes(self, tree: object) -> list[int]:
        return self.pids

    def note_second(self, row: ProcessorSecond) -> None:
        self.rows.append(row)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Clocks, threads and host times that a test sets."""
    state: dict[str, Any] = {"mono": 50 * S, "wall": 1_000 * S, "threads": {}, "host": HostTimes(0, 0)}
    monkeypatch.setattr(schedstat.time, "monotonic_ns", lambda: state["mono"])
    monkeypatch.setattr(schedstat.time, "time_ns", lambda: state["wall"])
    monkeypatch.setattr(schedstat, "children", dict)
    monkeypatch.setattr(schedstat, "host_times", lambda: state["host"])
    monkeypatch.setattr(
        schedstat, "read_threads", lambda pids: {p: state["threads"][p] for p in pids if p in state["threads"]}
    )
    return state


def test_seconds_are_on_the_runs_clock_whatever_is_done_to_the_hosts(planted: dict[str, Any]) -> None:
    server = Serving(7)
    sampler = CpuTimesSampler([server], start_unix_ns=1_001 * S)
    planted["threads"] = {7: Times(0, 0)}
    sampler.sample()
    for k in (1, 2, 3):
        planted["mono"] += S
        planted["wall"] += S + (-3_600 * S if k == 2 else 0)  # the clock is set back by an hour
        planted["threads"] = {7: Times(k * 600 * MS, k * 30 * MS)}
        planted["host"] = HostTimes(k * 900 * MS, k * 20 * MS)
        sampler.sample()
    assert [row.t_ns for row in server.rows] == [0, S, 2 * S], "the common start was a second after the first sample"
    assert {astuple(row)[1:] for row in server.rows} == {
        (S, 1, 600 * MS, 30 * MS, 600 * MS, 30 * MS, 900 * MS, 20 * MS)
    }


def test_a_server_that_is_started_again_has_no_rows_of_its_start(planted: dict[str, Any]) -> None:
    dies, lives = Serving(7), Serving(9)
    sampler = CpuTimesSampler([dies, lives], start_unix_ns=1_000 * S)
    run = 0
    for pids in ([7], [7], [], [], [70], [70], [71], [71]):  # the last new start falls between two samples
        dies.pids, run = pids, run + 500 * MS
        planted["mono"] += S
        planted["threads"] = {pid: Times(run + 40 * S * (pid > 9), 90 * S) for pid in (7, 9, 70, 71)}
        sampler.sample()
    assert [row.t_ns // S for row in dies.rows] == [2, 6, 8]
    assert {row.run_ns for row in dies.rows} == {500 * MS}
    assert [row.t_ns // S for row in lives.rows] == [2, 3, 4, 5, 6, 7, 8]


def test_a_counter_of_the_host_that_falls_is_no_negative_time(planted: dict[str, Any]) -> None:
    server = Serving(7)
    sampler = CpuTimesSampler([server], start_unix_ns=0)
    for host in (HostTimes(5 * S, 3 * S), HostTimes(6 * S, 2 * S), HostTimes(7 * S, None)):
        planted["mono"] += S
        planted["threads"], planted["host"] = {7: Times(0, 0)}, host
        sampler.sample()
    assert [(row.host_busy_ns, row.host_stolen_ns) for row in server.rows] == [(S, 0), (S, None)]


def test_a_kernel_that_does_not_count_gives_no_rows(planted: dict[str, Any]) -> None:
    server = Serving(7)
    sampler = CpuTimesSampler([server], start_unix_ns=0)
    sampler.sample()
    sampler.sample()
    assert server.rows == []


SPIN = """
import os, time
os.fork(), print("up", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    pass
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not count run delay")
def test_two_busy_processes_on_one_processor_wait_half_of_the_time(tmp_path: Path) -> None:
    """The whole way: guard, owner, its process tree, the kernel's count, a row."""
    engine = CommandEngine(name="spin", served_model="none", argv=(sys.executable, "-c", SPIN))
    owner = ReplicaOwner(engine, "replica 0", str(tmp_path / "server-0.log"), "secret", "127.0.0.1")
    owner.cpus, owner.nice = [min(os.sched_getaffinity(0))], os.getpriority(os.PRIO_PROCESS, 0) + 3
    sampler = CpuTimesSampler([owner], time.time_ns())
    try:
        started = owner.start(30, Part(rank=1, hosts=2, master="127.0.0.1", master_port=1))  # not asked for answers
        assert isinstance(started, Started)
        deadline = time.monotonic() + 20
        while (tmp_path / "server-0.log").read_text().count("up") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        sampler.sample()
        time.sleep(1.0)
        sampler.sample()
        assert owner._process is not None and owner._process.pid is not None
        assert os.getpriority(os.PRIO_PROCESS, owner._process.pid) == owner.nice
    finally:
        owner.stop(0)
    sampler.sample()
    (row,) = owner.look().seconds
    assert owner.look().seconds == []
    assert row.threads == 2
    both = (row.run_ns + row.delay_ns) / row.length_ns
    assert 1.6 < both < 2.1, "either always ran or waited, but for what the host of this machine took"
    assert row.delay_ns > 0.9 * row.run_ns, "they shared one processor, if not with others as well"
    assert row.host_busy_ns is not None and row.host_busy_ns >= 0.5 * row.run_ns
    assert read_threads([2**22 + 1]) == {}
