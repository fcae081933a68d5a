"""Ctrl-C, SIGTERM and a terminal that hangs up, in every phase of a run, with real processes: all end in order.

The harness is the leader of a session and of its only group of processes, as in a terminal, which sends Ctrl-C and
hang-ups to the whole group.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from conftest import ROOT, StartServer, descendants, processes_of, wait_for

from harness.record.manifest import RunDir, RunManifest, read_manifest
from harness.record.results import read_results

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANG_S = 120.0
"""Longer than anything here takes on a busy machine."""


class Terminal:
    """A verb in the foreground."""

    def __init__(self, folder: Path, *words: str | Path, read: bool = True) -> None:
        """``read``: somebody reads what it reports."""
        self.folder = folder
        folder.mkdir()
        self.said: IO[str] = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness", *map(str, words), "--out", str(folder / "runs")], cwd=ROOT,
            stdout=(folder / "stdout").open("w") if read else subprocess.PIPE, stderr=self.said,
            start_new_session=True, preexec_fn=hear_all,
        )  # fmt: skip
        if self.process.stdout is not None:
            fcntl.fcntl(self.process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        self.seen: set[int] = set()

    @property
    def run(self) -> RunDir | None:
        runs = [path.parent for path in (self.folder / "runs").glob("*/run.json")]
        return RunDir(runs[0]) if runs else None

    @property
    def manifest(self) -> RunManifest | None:
        return None if self.run is None else read_manifest(self.run.path)

    @property
    def words(self) -> str:
        return Path(self.said.name).read_text()

    def when(self, what: str, reached: Callable[[], bool]) -> None:
        """Wait until a phase is reached; the verb must not end before it."""

        def here() -> bool:
            assert self.process.poll() is None, f"ended before: {what}\n{self.words}"
            return reached()

        wait_for(here, HANG_S, what)

    def send(self, number: signal.Signals) -> None:
        self.seen |= {process.pid for process in descendants(self.process.pid)}
        if number == signal.SIGTERM:
            self.process.send_signal(number)
        else:
            os.killpg(self.process.pid, number)

    def ends(self) -> int:
        """Its exit status; nothing that it started is left."""
        code = self.process.wait(HANG_S)
        wait_for(lambda: not processes_of(self.folder / "runs"), HANG_S, "its processes are gone")
        assert not [pid for pid in self.seen if Path(f"/proc/{pid}").exists() and _state(pid) not in "ZX"]
        assert "Traceback" not in self.words, self.words
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.said.close()
        return code


def hear_all() -> None:
    """What runs in the background or under nohup ignores some signals, and hands that on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """40 requests, all due within two seconds."""
    file = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": k / 20, "input_tokens": 4, "output_tokens": 400} for k in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sent(*numbers: signal.Signals) -> pytest.MarkDecorator:
    """Each phase hears any of them; each is sent in some phase that breaks off and in some that ends in order."""
    return pytest.mark.parametrize("number", numbers, ids=[number.name for number in numbers])


@sent(signal.SIGTERM)
def test_before_the_load_nothing_is_kept_back(
    fake_server: StartServer, tmp_path: Path, trace: Path, number: signal.Signals
) -> None:
    """In the first request: no row, the run says that it was stopped, exit 130."""
    server = fake_server("--ttft", "600")
    verb = Terminal(tmp_path / "t", "replay", trace, "--base-url", server.url, "--workers", "2")
    verb.when("the first request", lambda: verb.run is not None)
    verb.send(number)
    assert verb.ends() == 130
    manifest = verb.manifest
    assert manifest is not None and (manifest.status, manifest.reason) == ("failed", "stopped by the user")
    assert verb.words.rstrip().endswith("harness: stopped")


@sent(signal.SIGINT)
def test_load_workers_that_get_ready_are_ended(
    fake_server: StartServer, tmp_path: Path, trace: Path, number: signal.Signals
) -> None:
    server = fake_server("--itl", "1")
    verb = Terminal(tmp_path / "t", "replay", trace, "--base-url", server.url, "--workers", "2")
    verb.when("a load worker", lambda: verb.run is not None and verb.run.worker_log(0).exists())
    verb.send(number)
    code, manifest = verb.ends(), verb.manifest
    assert manifest is not None
    assert (code, manifest.status) in ((130, "failed"), (3, "stopped")), "stopped: they were ready sooner than that"


@sent(signal.SIGHUP)
def test_before_the_common_start_every_request_has_its_row(
    fake_server: StartServer, tmp_path: Path, trace: Path, number: signal.Signals
) -> None:
    """The start is given and a second ahead: nothing is sent, which every row says."""
    server = fake_server("--itl", "1")
    verb = Terminal(tmp_path / "t", "replay", trace, "--base-url", server.url, "--workers", "2")
    verb.when("the start", lambda: (m := verb.manifest) is not None and m.status == "running")
    verb.send(number)
    verb.when("it is heard", lambda: "stopping: no new requests" in verb.words)
    verb.send(number)
    assert verb.ends() == 3
    assert_rows(verb, {"unsent", "stopped"})


@sent(signal.SIGINT, signal.SIGTERM)
def test_under_load_what_is_in_flight_may_end_and_a_second_signal_ends_it(
    fake_server: StartServer, tmp_path: Path, trace: Path, number: signal.Signals
) -> None:
    server = fake_server("--itl", "1")
    verb = Terminal(tmp_path / "t", "replay", trace, "--base-url", server.url, "--workers", "2")
    verb.when("load", lambda: bool(re.search(r"\b[1-9]\d* in flight", verb.words)))
    verb.send(number)
    verb.when("it is heard", lambda: "stopping: no new requests" in verb.words)
    verb.send(number)
    assert verb.ends() == 3
    rows = assert_rows(verb, {"unsent", "stopped"})
    assert rows.count("stopped") > 0
    if number != signal.SIGHUP:
        assert "stopping at once" in verb.words


@sent(signal.SIGHUP)
def test_a_report_that_nobody_reads_is_broken_off(
    fake_server: StartServer, tmp_path: Path, trace: Path, number: signal.Signals
) -> None:
    """All is measured and written; what waits is the report, for a reader of its standard output."""
    server = fake_server("--ttft", "0.001", "--itl", "0.0001")
    verb = Terminal(
        tmp_path / "t", "replay", trace, "--base-url", server.url, "--workers", "1", "--format", "json", read=False
    )
    verb.when("the report", lambda: (m := verb.manifest) is not None and m.status == "complete")
    verb.when("it waits", lambda: waits_for_a_reader(verb.process.pid))
    verb.send(number)
    assert verb.ends() == 130
    manifest = verb.manifest
    assert manifest is not None and manifest.status == "complete"
    assert_rows(verb, {None})


@sent(signal.SIGTERM)
def test_a_warm_up_is_broken_off(fake_server: StartServer, tmp_path: Path, trace: Path, number: signal.Signals) -> None:
    server = fake_server("--itl", "1")
    verb = Terminal(tmp_path / "t", "capacity", trace, "--base-url", server.url, "--slo", "ttft=10s")
    verb.when("the warm-up", lambda: "warming up" in verb.words)
    verb.send(number)
    assert verb.ends() == 130
    assert not list((tmp_path / "t").rglob("results-*.arrows"))


def assert_rows(verb: Terminal, classes: set[str | None]) -> list[str | None]:
    """One row for each request, of these error classes; those of each."""
    run, manifest = verb.run, verb.manifest
    assert run is not None and manifest is not None
    rows = [row for path in run.all_results() for row in read_results(path).to_pylist()]
    assert sorted(row["request_id"] for row in rows) == [*range(40)]
    found = [row["error"] for row in rows]
    assert set(found) <= classes, found
    if classes != {None}:
        assert (manifest.status, manifest.reason) == ("stopped", "stopped by the user")
    return found


def waits_for_a_reader(pid: int) -> bool:
    """Whether its main thread is in a write to a pipe that takes no more."""
    with contextlib.suppress(OSError):
        return "pipe" in Path(f"/proc/{pid}/wchan").read_text()
    return False
