"""Counters of several processes: added up where they are named, left alone where they cannot be told apart."""

from __future__ import annotations

import http.server
import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import StartServer
from run_files import SPEC, good, write_run

from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.analysis.validity.counters import moved_by, shared_addresses
from harness.errors import ServerError, UsageError
from harness.record.manifest import Replica, RunDir, read_manifest
from harness.record.samples import SERVER_SCHEMA, read_server_metrics
from harness.server.access import Access
from harness.server.counters import (
    check_metrics_urls,
    count_after,
    count_before,
    parse_counters,
    several_processes,
    summed,
)

START = "process_start_time_seconds"
INPUT, OUTPUT = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
KEPT = {INPUT: 100.0, OUTPUT: 50.0, START: 7.0}
MOVED = {INPUT: 260.0, OUTPUT: 130.0, START: 7.0}
"""What 20 requests of 8 in and 4 out make of it."""
A, B = {START: 1.0, INPUT: 5.0}, {START: 2.0, INPUT: 9.0}


def check(s, name):
    return next(c for c in s.checks if c.name == name)


@pytest.mark.parametrize(
    ("readings", "at_once", "over_time"),
    [
        ([A, A, A, A], False, False),
        ([A, A, B, B], True, False),  # over time: it began anew
        ([A, B, A, B], True, True),
        ([B, B, A, B], True, True),
        ([A, B, {START: 3.0}], True, False),  # it began anew twice
        ([{INPUT: 5.0}, {INPUT: 2.0}, {INPUT: 3.0}], True, False),  # once
        ([{INPUT: 5.0}, {INPUT: 2.0}, {INPUT: 6.0}, {INPUT: 3.0}], True, True),
        ([{INPUT: 5.0}, {INPUT: 5.0}, {INPUT: 6.0}], False, False),
        ([], False, False),
        ([{}, A], False, False),
    ],
)
def test_processes_that_take_turns_are_told_from_one_that_began_anew(readings, at_once, over_time):
    assert several_processes(readings, at_once=True) is at_once
    assert several_processes(readings) is over_time


def test_several_pages_are_added_up_and_keep_their_start_times():
    info = "vllm:cache_config_info"
    one = {INPUT: 5.0, START: 1.0, f"{info} block_size": 16.0, f"{info} num_gpu_blocks": 100.0}
    two = one | {START: 2.0, INPUT: 7.0}
    assert summed([one]) == one
    assert summed([one, two]) == {
        INPUT: 12.0, f"{START} 0": 1.0, f"{START} 1": 2.0, f"{info} block_size": 16.0, f"{info} num_gpu_blocks": 200.0,
    }  # fmt: skip
    assert f"{info} block_size" not in summed([one, two | {f"{info} block_size": 32.0}])


# -------------------------------------------------------------------------------------------------- reading, over HTTP


@contextmanager
def pages(*texts: Callable[[int], str | None], keys: list[str | None] | None = None) -> Iterator[list[str]]:
    """A server with a page for each of ``texts``, which is told how often it was asked before."""
    asked = [0] * len(texts)

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            k = int(self.path.rpartition("/")[2])
            if keys is not None:
                keys.append(self.headers["Authorization"])
            text = texts[k](asked[k])
            asked[k] += 1
            self.send_response(404 if text is None else 200)
            self.send_header("Content-Length", str(len(text or "")))
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield [f"http://127.0.0.1:{server.server_port}/{k}" for k in range(len(texts))]
        server.shutdown()


def text(tokens: float, start: float, model: str = "m") -> str:
    lines = [f'{INPUT}{{engine="{e}",model_name="{model}"}} {tokens / 2}' for e in (0, 1)]
    return "\n".join([*lines, f"{START} {start}", ""])


def replica(urls: Sequence[str]) -> Replica:
    return Replica(index=0, base_url="http://127.0.0.1:1/v1", metrics_urls=list(urls))


def test_engines_and_replicas_are_added_up():
    with pages(lambda _: text(10, 1), lambda n: text(20 + 4 * (n > 4), 2)) as urls:
        r = replica(urls)
        count_before([r], None)
        assert r.counters_before == {INPUT: 30.0, f"{START} 0": 1.0, f"{START} 1": 2.0}
        count_after([r], {}, None)
        assert r.counters_after == {INPUT: 34.0, f"{START} 0": 1.0, f"{START} 1": 2.0}
        assert not r.several_servers
        r.counters_after = None
        count_after([r], {0: "killed"}, None)
        assert r.counters_after is None


@pytest.mark.parametrize("shown", [0, 5])
def test_a_balancer_is_seen_before_the_load_or_after_it(shown):
    """The other server answers every second reading, from the start or not before the load is over."""
    with pages(lambda n: text(10, 1 + (n >= shown and n % 2))) as urls:
        r = replica(urls)
        count_before([r], None)
        assert r.several_servers is (shown == 0)
        count_after([r], {}, None)
        assert r.several_servers
        assert r.counters_before is None and r.counters_after is None


def test_half_a_book_is_none():
    with pages(lambda _: text(10, 1), lambda _: None) as urls:
        r = replica(urls)
        count_before([r], None)
        assert r.counters_before is None


def test_the_api_key_stays_with_its_server():
    access = Access(api_key="secret", headers={"X-Tenant": "t1"})
    assert access.at("http://a:1/metrics", "http://a:1/v1?api-version=3") == access
    for other in ("http://a:2/metrics", "https://a:1/metrics", "http://b:1/metrics"):
        assert access.at(other, "http://a:1/v1").lines() == {"X-Tenant": "t1"}
    keys: list[str | None] = []
    with pages(lambda _: text(10, 1), keys=keys) as urls:
        count_before([replica(urls)], "secret")
    assert set(keys) == {None}


def test_pages_are_dealt_to_base_urls():
    with pages(lambda _: text(10, 1), lambda _: text(10, 1), lambda _: "up 1\n") as (a, b, other):
        assert check_metrics_urls([], ["x", "y"], None) == [[], []]
        assert check_metrics_urls([a, b, a], ["http://x/v1"], None) == [[a, b]]
        assert check_metrics_urls([a, b], ["http://x/v1", "http://y/v1"], None) == [[a], [b]]
        with pytest.raises(UsageError, match="one for each"):
            check_metrics_urls([a], ["http://x/v1", "http://y/v1"], None)
        with pytest.raises(UsageError, match="expected something like"):
            check_metrics_urls(["127.0.0.1:8000"], ["http://x/v1"], None)
        with pytest.raises(ServerError, match="no counters"):
            check_metrics_urls([other], ["http://x/v1"], None)


# ------------------------------------------------------------------------------------------------------------- judging


def summary(tmp_path: Path, sampled: Sequence[dict[str, float]] = (), engine: str = "url", **facts: object) -> Summary:
    found = {"index": 0, "base_url": "http://127.0.0.1:1/v1", "counters_before": KEPT, "counters_after": MOVED}
    path = write_run(tmp_path / "run", [good(k) for k in range(20)], engine=engine, replicas=[Replica(**found | facts)])
    write_samples(path, 0, sampled)
    return summarise(read_run(path))


def write_samples(path: Path, replica: int, sampled: Sequence[dict[str, float]]) -> None:
    columns = {"process_start_s": START, "prompt_tokens_total": INPUT, "generation_tokens_total": OUTPUT}
    rows = [
        {"t_ns": k * 10**9, "took_ns": 1, **{c: page.get(name) for c, name in columns.items()}}
        for k, page in enumerate(sampled)
    ]
    file = str(RunDir(path).server_metrics(replica))
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, SERVER_SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema=SERVER_SCHEMA))


OTHER = {INPUT: 80.0, OUTPUT: 40.0, START: 9.0}


@pytest.mark.parametrize(
    ("sampled", "facts"),
    [
        ([], {"several_servers": True, "counters_before": None, "counters_after": None}),
        ([KEPT, OTHER, KEPT, OTHER], {}),
        ([KEPT, OTHER, OTHER], {}),  # and after the load the first one again
        ([OTHER], {"counters_after": OTHER, "counters_before": KEPT, "several_servers": True}),
    ],
    ids=["seen when read", "seen when sampled", "back at the end", "said"],
)
def test_several_servers_behind_one_address_are_not_blamed(tmp_path, sampled, facts):
    s = summary(tmp_path, sampled, **facts)
    assert s.verdict == "VALID"
    said = check(s, "server_counters")
    assert (said.ok, said.gate) == (False, False)
    assert "several servers answer at http://127.0.0.1:1/v1" in said.observed and "--metrics-url" in said.advice
    assert s.cost.usd_per_1m_total.value is None and "how many are paid for is not known" in s.cost.reason
    for name in ("server_restarts", "token_books"):
        assert check(s, name).ok is None and "several servers answer here" in check(s, name).observed


@pytest.mark.parametrize(
    ("sampled", "after", "engine"),
    [
        ([KEPT, OTHER, OTHER], OTHER, "url"),  # it began anew
        ([KEPT, OTHER, KEPT, OTHER], OTHER, "vllm-cpu"),  # ours: the port is held, so nobody else answers
    ],
)
def test_a_restart_is_still_a_restart(tmp_path, sampled, after, engine):
    s = summary(tmp_path, sampled, engine, counters_after=after)
    assert s.verdict == "INVALID" and check(s, "server_restarts").ok is False
    assert check(s, "server_counters").ok is True


BACK = {INPUT: 10.0, OUTPUT: 5.0}


def without_start(*readings: dict[str, float]) -> list[dict[str, float]]:
    return [{name: n for name, n in one.items() if name != START} for one in readings]


@pytest.mark.parametrize(
    ("sampled", "words"),
    [
        ([KEPT, BACK | {START: 9.0}, MOVED | {START: 9.0}], "started again"),  # no start time before and after
        ([{INPUT: 180.0, OUTPUT: 90.0}, BACK], "its counters fell"),  # and are higher than before at the end
        ([{INPUT: 180.0, OUTPUT: 90.0}, {}, BACK], "its counters fell"),  # it had none while it was not used
    ],
)
def test_a_restart_in_mid_run_is_seen_though_the_counters_at_the_end_are_higher(tmp_path, sampled, words):
    """Two servers; nothing is said of the first."""
    before, after = without_start(KEPT, MOVED)
    urls = ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]
    path = write_run(
        tmp_path / "run", [good(k) for k in range(20)], engine="url", spec=replace(SPEC, base_urls=urls, retries=3),
        replicas=[
            Replica(index=k, base_url=url, counters_before=before, counters_after=after) for k, url in enumerate(urls)
        ],
    )  # fmt: skip
    write_samples(path, 0, without_start(KEPT, KEPT, MOVED))
    write_samples(path, 1, sampled)
    s = summarise(read_run(path))
    said = check(s, "server_restarts")
    assert s.verdict == "INVALID" and said.ok is False and s.cost.usd_per_1m_total.value is None
    assert said.observed == f"replica 1 (http://127.0.0.1:2/v1){' ' if words[0] == 's' else ': '}{words}"


def test_one_of_several_pages_that_began_anew_is_seen(tmp_path):
    before = {INPUT: 100.0, OUTPUT: 50.0, f"{START} 0": 1.0, f"{START} 1": 2.0}
    after = before | {INPUT: 260.0, OUTPUT: 130.0}
    urls = ["http://127.0.0.1:1/metrics", "http://127.0.0.1:2/metrics"]
    same = summary(tmp_path / "a", counters_before=before, counters_after=after, metrics_urls=urls)
    assert check(same, "server_restarts").ok and check(same, "token_books").ok
    assert check(same, "server_counters").observed == "2 read"
    assert same.cost.replicas == 2, "two servers are paid for behind one address"
    anew = after | {f"{START} 1": 3.0}
    other = summary(tmp_path / "b", counters_before=before, counters_after=anew, metrics_urls=urls)
    assert check(other, "server_restarts").ok is False


def test_counters_that_were_not_to_be_read_are_not_checked(tmp_path):
    path = write_run(
        tmp_path / "run", [good(k) for k in range(20)], engine="url", spec=replace(SPEC, counters=False),
        replicas=[Replica(index=0, base_url="http://127.0.0.1:1/v1")],
    )  # fmt: skip
    s = summarise(read_run(path))
    assert s.verdict == "VALID"
    for name in ("server_counters", "token_books", "server_restarts"):
        assert (check(s, name).ok, check(s, name).observed) == (None, "counters not read, as asked")


def test_nothing_is_worked_out_from_shared_counters(tmp_path):
    path = write_run(
        tmp_path / "run", [good(k) for k in range(20)], engine="url",
        replicas=[Replica(index=0, base_url="http://127.0.0.1:1/v1", several_servers=True)],
    )  # fmt: skip
    run = read_run(path)
    assert shared_addresses(run) == ["http://127.0.0.1:1/v1"]
    assert moved_by(run, INPUT) is None


# ---------------------------------------------------------------------------------------------------------- end to end


@contextmanager
def balancer(ports: Sequence[int]) -> Iterator[int]:
    """Gives each connection to the next of ``ports``, as a Kubernetes Service does."""
    turns = itertools.cycle(ports)
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", next(turns)))
            for one in ((client, server), (server, client)):
                threading.Thread(target=pump, args=one, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_a_balancer_before_two_servers_is_measured_and_its_counters_where_they_are(
    fake_server: StartServer, tmp_path: Path
) -> None:
    """40 requests go to two servers through one address: VALID, not checked; with both pages named, checked."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(json.dumps({"arrival_s": k / 20, "input_tokens": 20, "output_tokens": 4}) + "\n" for k in range(40))
    )
    servers = [fake_server("--model", "m") for _ in range(2)]
    roots = [s.url.removesuffix("/v1") for s in servers]
    found = []
    with balancer([int(root.rpartition(":")[2]) for root in roots]) as port:
        base = ["replay", str(trace), "--base-url", f"http://127.0.0.1:{port}/v1", "--workers", "1"]
        named = [word for root in roots for word in ("--metrics-url", f"{root}/metrics")]
        for k, more in enumerate(([], named, ["--no-counters"])):
            done = subprocess.run(
                [sys.executable, "-m", "harness", *base, *more, "--out", str(tmp_path / str(k))],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode in (0, 3), done.stderr
            (folder,) = (tmp_path / str(k)).iterdir()
            found.append((read_manifest(folder), summarise(read_run(folder))))
    (shared, s), (both, t), (unread, u) = found
    assert shared.replicas[0].several_servers
    assert (check(s, "server_counters").ok, check(s, "token_books").ok, check(s, "server_restarts").ok) == (
        False, None, None,
    )  # fmt: skip
    assert both.replicas[0].counters_after is not None
    assert moved_by(read_run(Path(t.run)), OUTPUT) == 160.0, "what both made, together"
    assert (check(t, "server_counters").ok, check(t, "token_books").ok, check(t, "server_restarts").ok) == (
        True, True, True,
    )  # fmt: skip
    assert unread.replicas[0].counters_before is None and not list(Path(u.run).glob("server-metrics-*"))
    assert check(u, "token_books").observed == "counters not read, as asked"
    for one in (s, t, u):
        gates = {c.name for c in one.checks if c.gate and c.ok is False}
        assert gates <= {"lag", "generator_cpu", "generator_lag", "arrival_process", "littles_law"}, one.reasons


# ---------------------------------------------------------------------------------------------- counters of no number


def rewritten(path: Path, *, by: dict[str, str]) -> Path:
    """The run directory with other words in its manifest."""
    text = RunDir(path).manifest.read_text()
    for old, new in by.items():
        assert old in text
        text = text.replace(old, new)
    RunDir(path).manifest.write_text(text)
    return path


@pytest.mark.parametrize("word", ["null", "NaN", "Infinity", "-Infinity", "1e999"])
def test_a_counter_that_is_no_number_is_not_measured_and_the_run_is_read(tmp_path, word):
    """Older runs have null there, as msgspec writes NaN; others' writers have the words."""
    path = write_run(
        tmp_path / "run", [good(k) for k in range(20)], engine="url",
        replicas=[Replica(index=0, base_url="http://127.0.0.1:1/v1",
                          counters_before=KEPT | {"vllm:odd_total": 12345.0},
                          counters_after=MOVED | {"vllm:odd_total": 67890.0})],
    )  # fmt: skip
    s = summarise(read_run(rewritten(path, by={"12345.0": word})))
    assert s.verdict == "VALID" and check(s, "token_books").ok and check(s, "server_restarts").ok
    said = check(s, "server_counters")
    assert (said.ok, said.gate) == (False, False) and "vllm:odd_total" in said.observed


@pytest.mark.parametrize("lost", [INPUT, START])
def test_what_needs_a_counter_that_is_no_number_is_not_checked(tmp_path, lost):
    for side in ("counters_before", "counters_after"):
        values = {"counters_before": KEPT, "counters_after": MOVED}
        s = summary(tmp_path / side, **{side: values[side] | {lost: None}})
        assert s.verdict == "VALID", side
        assert check(s, "token_books").ok is (None if lost == INPUT else True)
        assert lost in check(s, "server_counters").observed


def test_samples_that_are_no_number_are_null_and_said(tmp_path):
    """Runs of before the parser knew NaN have it in their samples."""
    sampled = [KEPT, KEPT | {START: float("nan")}, KEPT, KEPT | {START: float("inf"), INPUT: float("nan")}, KEPT]
    s = summary(tmp_path, sampled)
    assert s.verdict == "VALID" and check(s, "server_restarts").ok
    said = check(s, "server_counters")
    assert said.ok is False and "several" not in said.observed
    assert "process_start_s" in said.observed and "prompt_tokens_total" in said.observed
    table = read_server_metrics(RunDir(Path(s.run)).server_metrics(0))
    assert table is not None and table.column("process_start_s").to_pylist() == [7.0, None, 7.0, None, 7.0]


def test_a_page_with_a_counter_of_no_number_is_written_and_read_again(tmp_path):
    first = parse_counters(f'{INPUT} 5\nvllm:odd_total NaN\n{OUTPUT}{{engine="1"}} +Inf\n')
    assert first == {INPUT: 5.0, "vllm:odd_total": None, OUTPUT: None}
    path = write_run(
        tmp_path / "run", [good(0)], replicas=[Replica(index=0, base_url="http://x/v1", counters_before=first)]
    )
    assert read_manifest(path).replicas[0].counters_before == first
    assert summed([first, {INPUT: 2.0, OUTPUT: 3.0}]) == {INPUT: 7.0, "vllm:odd_total": None, OUTPUT: None}
    assert not several_processes([first, first, first], at_once=True)
