"""Known-truth servers and the command line, as a user starts them: in processes of their own."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

from harness.trace.io import TraceRecord

settings.register_profile("no clock", deadline=None)  # how long an example takes is the machine's load
settings.load_profile("no clock")

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class FakeServer:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def truth(self) -> list[dict[str, Any]]:
        """What the server itself wrote down, one entry per finished answer, those before a load aside."""
        return [entry for line in self.log.read_text().splitlines() if (entry := json.loads(line)).pop("load")]


LONGEST = (
    "test_hosts", "test_deployment", "test_sweep_store", "test_capacity_search", "test_sweep_run", "test_worker",
    "test_page", "test_formats_fuzz", "test_coverage", "test_replica_death", "test_known_truth", "test_store",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first, so that no worker of ``pytest -n`` is left alone with it."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def no_own_tiers(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own tiers file must not leak into tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    # nor its processes into `harness ps`; not in tmp_path, where tests look for the one run they made
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def trace_record(
    line: int, arrival_s: float | None, input_tokens: int | None, output_tokens: int | None, *rest: Any, **more: Any
) -> TraceRecord:
    """A record as a trace gives it, its time in seconds."""
    arrival_ns = None if arrival_s is None else round(arrival_s * 1e9)
    return TraceRecord(arrival_ns, input_tokens, output_tokens, *rest, line=line, **more)


StartServer = Callable[..., FakeServer]


@pytest.fixture
def fake_server(tmp_path: Path) -> Iterator[StartServer]:
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, **env: str) -> FakeServer:
        log = tmp_path / f"truth-{len(started)}.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.cluster.engines.fake.server", "--log", str(log), *args],
            cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        ready, _, url = process.stdout.readline().strip().partition(" ")
        assert ready == "ready"
        return FakeServer(url, process, log)

    yield start
    for process in started:
        process.kill()
        process.wait(120)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or the test is skipped."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=flags, timeout=60_000)
        yield opened
        opened.close()


SENDS = frozenset({"replay", "run", "capacity"})


def _command(args: tuple[str | Path, ...]) -> list[str]:
    """The command line. A verb that sends judges the small runs of these tests, unless the test says how many."""
    words = [*map(str, args)]
    if words and words[0] in SENDS and not any(w.startswith("--min-requests") for w in words) and "--help" not in words:
        words.insert(1, "--min-requests=1")
    return [sys.executable, "-m", "harness", *words]


class Forked:
    """Commands one after the other, each a process of its own (`tests.forked`)."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._channel, self._lines = ours, ours.makefile("r")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )  # fmt: skip

    def run(
        self, words: list[str], env: Mapping[str, str], cwd: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run`, which also waits for the end of both streams."""
        message = json.dumps({"arguments": words, "env": dict(env), "cwd": str(cwd)}).encode()
        pipes = [os.pipe() for _ in range(2)]
        socket.send_fds(self._channel, [message], [there for _, there in pipes])
        for _, there in pipes:
            os.close(there)
        started = self._lines.readline()
        assert started, self._process.communicate()
        pid = int(started)
        said: dict[int, str] = {}

        def read(at: int, file: int) -> None:
            with open(file, encoding="utf-8") as stream:
                said[at] = stream.read()

        readers = [threading.Thread(target=read, args=(at, here), daemon=True) for at, (here, _) in enumerate(pipes)]
        for reader in readers:
            reader.start()
        end = time.monotonic() + timeout_s
        for reader in readers:
            reader.join(max(0.0, end - time.monotonic()))
        if any(reader.is_alive() for reader in readers):
            os.kill(pid, signal.SIGKILL)
            self._lines.readline()
            raise subprocess.TimeoutExpired(words, timeout_s)
        return subprocess.CompletedProcess(words, int(self._lines.readline()), said[0], said[1])


@functools.cache
def _forked(worker: int) -> Forked:
    return Forked()


def harness(*args: str | Path, timeout: float = 120, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    words, whole = _command(args), {**os.environ, **env}
    if not any(name.startswith("PYTHON") for name in env):
        return _forked(os.getpid()).run(words[3:], whole, cwd, timeout)
    return subprocess.run(words, cwd=cwd, env=whole, capture_output=True, text=True, timeout=timeout, check=False)


def start_harness(*args: str | Path, **env: str) -> subprocess.Popen[str]:
    """Start the command line in a session of its own and return at once."""
    return subprocess.Popen(
        _command(args),
        cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Poll until true; fail with ``what`` when it takes longer than the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.1)


STARVED = 0.2
"""Share of the time in which tasks waited for a processor, from which on a machine keeps no time."""


def cpu_waits_s() -> float | None:
    """How long, so far, at least one task of this machine was ready to run and did not; null where nobody counts."""
    try:
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
        return int(some.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, IndexError):
        return None


def in_time(play: Callable[[], Mapping[str, bool]], attempts: int = 3) -> None:
    """Hold times that are measured against bounds: ``play`` says which of them were kept, and asserts all else.

    One attempt within all bounds is enough, since none can be faster than the program. Where no attempt is, and the
    machine was short of processors in each, nothing was judged: the bounds are those of one that is not.
    """
    shares: list[float] = []
    kept: Mapping[str, bool] = {}
    for _ in range(attempts):
        before, began = cpu_waits_s(), time.monotonic()
        kept = play()
        if all(kept.values()):
            return
        after = cpu_waits_s()
        waited = 0.0 if before is None or after is None else after - before
        shares.append(waited / (time.monotonic() - began))
    missed = [words for words, ok in kept.items() if not ok]
    assert min(shares) > STARVED, missed
    pytest.skip(f"not judged, as tasks waited for a processor {min(shares):.0%} of the time: {', '.join(missed)}")


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Everything alive whose command line or environment names the run directory: servers, workers, guards."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid():
                continue
            named = any(str(run_dir) in arg for arg in process.cmdline())
            if named or any(str(run_dir) in v for k, v in process.environ().items() if k.startswith("HARNESS")):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """The process tree under ``pid``, itself excluded."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def gone(process: psutil.Process | int) -> bool:
    """Ended: no such process any more, another one under its pid, or a zombie that nobody has waited for."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)
