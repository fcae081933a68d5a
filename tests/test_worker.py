import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, StartServer, wait_for

from harness.errors import ResultsError
from harness.plan.file import INFO_KEY, SCHEMA, SCHEMA_VERSION, PlanInfo
from harness.record.results import read_results
from harness.record.samples import read_observations
from harness.scenarios.plan_reader import Planned
from harness.scenarios.schedule import Schedule


def write_plan(path, n=40, gap_s=0.02, tokens=5, timed=True, **columns):
    info = PlanInfo(
        schema_version=SCHEMA_VERSION, trace="t", trace_format="jsonl", trace_sha256="", rows_read=n, rows_kept=n,
        rows_dropped={}, arrivals="trace" if timed else "closed", speed=None, source_rate=None, planned_rate=None,
        seed=0, tokenizer=None, requests=n, span_s=None, notes=[],
    )  # fmt: skip
    rows = {
        "request_id": range(n), "phase": ["measured"] * n, "slice": range(n), "output_tokens": [tokens] * n,
        "scheduled_ns": [int(i * gap_s * 1e9) if timed else None for i in range(n)],
        "prompt_token_ids": [[1, 2, 3]] * n, **columns,
    }  # fmt: skip
    schema = SCHEMA.with_metadata({INFO_KEY: msgspec.json.encode(info)})
    table = pa.table({f.name: pa.array(rows.get(f.name, [None] * n), f.type) for f in SCHEMA}, schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    return path


class Worker:
    def __init__(self, folder, url, plan, *, worker=0, workers=1, env=None, **spec):
        self.results = Path(spec.pop("results", folder / f"results-{worker}.arrows"))
        self.observations = folder / f"worker-{worker}.arrows"
        spec = {
            "worker": worker, "workers": workers, "plan": str(plan), "results": str(self.results), "mode": "open",
            "observations": str(self.observations), "base_urls": [url], "model": "fake", **spec,
        }  # fmt: skip
        file = folder / f"spec-{worker}.json"
        file.write_text(json.dumps(spec))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness.scenarios.worker", str(file)], cwd=ROOT, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ready(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        event = json.loads(line)
        assert event["event"] == "ready", event
        return event

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def start(self, in_s=0.1):
        self.ready()
        self.tell(f"start {time.time_ns() + int(in_s * 1e9)}")
        return self

    def end(self, deadline_s=30):
        """(all events, the last one, the rows)"""
        watchdog = threading.Timer(deadline_s, self.process.kill)
        watchdog.start()
        out = self.process.stdout.read()  # not communicate(): that ends stdin, which means stop
        _, self.words = self.process.communicate()
        watchdog.cancel()
        events = [json.loads(line) for line in out.splitlines()]
        assert events, self.words
        assert events[-1]["event"] == "end", self.words
        rows = read_results(self.results).to_pylist() if self.results.is_file() else []
        assert len(rows) == events[-1]["rows"]
        return events, events[-1], sorted(rows, key=lambda r: r["request_id"])


@pytest.fixture(name="start")
def starter(tmp_path):
    workers = []

    def begin(*args, **spec):
        workers.append(Worker(tmp_path, *args, **spec))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.process.kill()
        worker.process.communicate(timeout=120)


def classes(rows):
    return Counter(row["error"] for row in rows)


# -- the order of things ----------------------------------------------------------------------------------------------


def planned(i, at=None, after=None, think=0):
    return Planned(i, at, after, think, b"")


def whole_schedule(rows, *, timed):
    """Of these requests, all of them read."""
    awaited = np.sort(np.array([one.after for one in rows if one.after is not None], dtype=np.int64))
    schedule = Schedule(rows, timed=timed, requests=len(rows), awaited=awaited)
    while schedule.read_more():
        pass
    return schedule


def test_a_timed_schedule_keeps_its_times():
    schedule = whole_schedule([planned(0, 5), planned(1, 5), planned(2, 9)], timed=True)
    assert schedule.next_due() == 5
    assert [schedule.take(100)[0].request_id for _ in range(3)] == [0, 1, 2]
    assert (schedule.left, schedule.next_due()) == (0, None)


def test_a_turn_waits_for_the_one_before_it():
    schedule = whole_schedule([planned(0, 0), planned(1, 3, after=0, think=10), planned(2, 50)], timed=True)
    assert schedule.take(0)[0].request_id == 0
    assert schedule.next_due() == 50
    assert not schedule.finished(7, 20)
    assert schedule.finished(0, 20)
    assert schedule.next_due() == 30
    turn, due = schedule.take(31)
    assert (turn.request_id, due) == (1, 30)
    assert [p.request_id for p in schedule.rest()] == [2]


def test_without_times_the_plan_has_its_order_and_waiting_turns_go_first():
    schedule = whole_schedule([planned(0), planned(1), planned(2, after=0, think=5), planned(3)], timed=False)
    assert schedule.take(0)[0].request_id == 0
    schedule.finished(0, 10)
    assert schedule.take(12)[0].request_id == 1, "the turn is still being thought about"
    assert schedule.take(15)[0].request_id == 2
    assert schedule.take(15)[0].request_id == 3


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_open_loop_follows_the_plan_and_measures_the_truth(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.05", "--itl", "0.01")
    worker = start(server.url, write_plan(tmp_path / "plan.arrow", n=60, gap_s=0.02)).start()
    events, end, rows = worker.end()
    assert [e["event"] for e in events[:-1]] == ["progress"] * (len(events) - 1)
    assert len(events) > 2
    assert events[-2]["sent"] >= events[-2]["done"] > 0
    assert end["exit"] is None
    assert worker.process.returncode == 0
    assert 0 < end["cpu_share"] < 1
    assert end["loop_lag_p99_s"] < 0.1
    assert 0 <= end["unstamped_share"] < 0.5, "the kernel begins a moment after it was asked"
    assert end["end_ns"] > 59 * 0.02e9
    assert classes(rows) == {None: 60}
    assert [row["scheduled_ns"] for row in rows] == [int(i * 0.02 * 1e9) for i in range(60)]
    lag = np.array([row["sent_ns"] - row["scheduled_ns"] for row in rows]) / 1e9
    assert lag.min() >= 0, "nothing is sent before its time"
    assert np.median(lag) < 0.005
    ttft = [row["chunk_gap_ns"][0] / 1e9 for row in rows]
    assert np.median(ttft) == pytest.approx(0.05, abs=0.02)
    assert {tuple(row["chunk_tokens"]) for row in rows} == {(1,) * 5}
    samples = [s for e in events for s in e.get("ttft_s", [])]
    assert 0 < len(samples) <= 60
    assert np.median(samples) == pytest.approx(0.05, abs=0.02)


def test_slices_of_several_workers_are_the_plan(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    plan = write_plan(tmp_path / "plan.arrow", slice=[i // 3 for i in range(40)])
    both = [start(server.url, plan, worker=k, workers=2) for k in range(2)]
    assert sum(worker.ready()["requests"] for worker in both) == 40
    at = time.time_ns() + 200_000_000
    for worker in both:
        worker.tell(f"start {at}")
    rows = [row for worker in both for row in worker.end()[2]]
    assert sorted(row["request_id"] for row in rows) == list(range(40))
    assert classes(rows) == {None: 40}
    assert all(row["request_id"] // 3 % 2 == row["worker"] for row in rows)


@pytest.mark.alone
def test_closed_loop_keeps_its_slots_full(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.2", "--itl", "0.005")  # long beside the lag of a busy machine
    plan = write_plan(tmp_path / "plan.arrow", n=36, timed=False)
    _, end, rows = start(server.url, plan, mode="closed", concurrency=6).start().end()
    assert classes(rows) == {None: 36}
    assert end["exit"] is None
    assert [row["scheduled_ns"] for row in rows[:6]] == [0] * 6, "all slots start at once"
    finished = sorted(row["finished_ns"] for row in rows)
    freed = sorted(row["scheduled_ns"] for row in rows[6:])
    assert freed == finished[:30], "a request is due when its slot became free"
    sent = [row["sent_ns"] for row in rows]
    assert sent == sorted(sent), "in the order of the plan"
    in_flight = [sum(r["sent_ns"] <= at < r["finished_ns"] for r in rows) for at in sent]
    assert max(in_flight) <= 6
    busy = sum(row["finished_ns"] - row["sent_ns"] for row in rows)
    assert busy / finished[-1] > 5


def test_a_cap_in_the_open_loop_is_lag_not_loss(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.1", "--itl", "0.005")
    plan = write_plan(tmp_path / "plan.arrow", n=20, gap_s=0.001)
    _, _, rows = start(server.url, plan, concurrency=4).start().end()
    assert classes(rows) == {None: 20}
    assert max(sum(r["sent_ns"] <= at < r["finished_ns"] for r in rows) for at in (r["sent_ns"] for r in rows)) <= 4
    assert rows[19]["sent_ns"] - rows[19]["scheduled_ns"] > 0.3e9
    assert rows[19]["scheduled_ns"] == 19_000_000


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_a_session_waits_for_its_own_answers(fake_server: StartServer, start, tmp_path, mode):
    server = fake_server("--ttft", "0.03", "--itl", "0.005")
    chain = {"slice": [0, 0, 0], "after": [None, 0, 1], "think_ns": [None, 50_000_000, 0]}
    plan = write_plan(tmp_path / "plan.arrow", n=3, gap_s=0.001, **chain)
    _, _, rows = start(server.url, plan, mode=mode, concurrency=2).start().end()
    assert classes(rows) == {None: 3}
    for before, row, think in ((rows[0], rows[1], 50_000_000), (rows[1], rows[2], 0)):
        assert row["scheduled_ns"] == before["finished_ns"] + think
        assert row["sent_ns"] >= row["scheduled_ns"]


# -- what a worker sees of itself -------------------------------------------------------------------------------------


def test_a_worker_writes_down_its_own_state_every_second(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.05", "--itl", "0.01", "--pad", "300")
    plan = write_plan(tmp_path / "plan.arrow", n=120, gap_s=0.02, tokens=20)
    worker = start(server.url, plan).start()
    _, end, rows = worker.end()
    seen = read_observations(worker.observations)
    columns = {name: seen.column(name).to_pylist() for name in seen.column_names}
    t_s = np.diff([0, *columns["t_ns"]]) / 1e9
    assert len(t_s) >= 3
    assert t_s[:-1] == pytest.approx(1, abs=0.3), "once a second, on an absolute schedule"
    # The whole of it is known from elsewhere: every request, every event, every byte and all time in flight.
    assert sum(columns["sent"]) == sum(columns["done"]) == 120
    chunks = sum(len(row["chunk_gap_ns"]) for row in rows)
    assert chunks <= sum(columns["events"]) <= chunks + 3 * 120, "opening, usage and [DONE] carry no output"
    assert sum(columns["bytes"]) == pytest.approx(chunks * 410, rel=0.2)
    in_flight = sum(n * dt for n, dt in zip(columns["in_flight"], t_s, strict=True))
    assert in_flight == pytest.approx(sum(r["finished_ns"] - r["sent_ns"] for r in rows) / 1e9, rel=0.1)
    assert columns["gc_pause_ns"] == [0] * len(t_s), "the collector is off"
    assert all(0 < share < 1.5 for share in columns["cpu_share"])
    cpu = sum(share * dt for share, dt in zip(columns["cpu_share"], t_s, strict=True)) / sum(t_s)
    assert cpu == pytest.approx(end["cpu_share"], rel=0.01)
    lags = zip(columns["loop_lag_p99_ns"], columns["loop_lag_max_ns"], strict=True)
    assert all(p99 is None or 0 <= p99 <= worst for p99, worst in lags)
    assert columns["backlog"][-1] <= 1 and all(20e6 < rss < 1e9 for rss in columns["rss_bytes"])


def test_a_stalled_loop_shows_in_its_second(fake_server: StartServer, tmp_path):
    plan = write_plan(tmp_path / "plan.arrow", n=100, gap_s=0.02)
    stall = (
        "import gevent, time, gc\n"
        "def stall():\n    time_sleep(0.4); gc.collect()\n"
        "time_sleep = w.gevent.monkey.get_original('time', 'sleep')\n"
        "begin = w.Observer.begin\n"
        "w.Observer.begin = lambda self: (begin(self), gevent.spawn_later(1.2, stall))", "",
    )  # fmt: skip
    lines, words = run_patched(
        tmp_path, fake_server("--ttft", "0.01").url, plan, stall, mode="open", concurrency=None,
        observations=str(tmp_path / "seen.arrows"),
    )  # fmt: skip
    assert json.loads(lines[-1])["exit"] is None, words
    seen = read_observations(tmp_path / "seen.arrows").to_pylist()
    stalled = [row for row in seen if (row["loop_lag_max_ns"] or 0) > 0.35e9]
    assert len(stalled) == 1
    assert 1.2e9 < stalled[0]["t_ns"] < 3e9
    assert stalled[0]["loop_lag_p99_ns"] > 0.3e9, "each tick missed in the stall counts"
    assert stalled[0]["gc_pause_ns"] > 0
    assert sum(row["gc_pause_ns"] > 0 for row in seen) == 1


def test_observations_survive_a_kill(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    worker = start(server.url, write_plan(tmp_path / "plan.arrow", n=2000, gap_s=0.01)).start()
    deadline = time.monotonic() + 120
    while not worker.observations.exists() or (seen := read_observations(worker.observations)).num_rows < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)  # two flushes
    worker.process.kill()
    worker.process.wait(120)
    seen = read_observations(worker.observations)
    torn = tmp_path / "torn.arrows"
    torn.write_bytes(worker.observations.read_bytes()[:-7])
    assert 1 <= read_observations(torn).num_rows < seen.num_rows
    torn.write_bytes(b"")
    assert read_observations(torn).num_rows == 0


@pytest.mark.parametrize("content", [b"not arrow at all", None])
def test_what_is_no_file_of_observations_is_said(tmp_path, content):
    path = tmp_path / "seen.arrows"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"seen\.arrows"):
        read_observations(path)


# -- how a run can end ------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_the_duration_cuts_the_plan(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    plan = write_plan(tmp_path / "plan.arrow", n=3000, gap_s=0.02)
    _, end, rows = start(server.url, plan, duration_s=0.6).start().end()
    assert end["exit"] is None
    assert set(classes(rows)) == {None, "unsent"}
    assert 10 <= classes(rows)[None] <= end["end_ns"] / 0.02e9 + 1, "none before its time, however late the cut was"
    assert end["end_ns"] < 30e9, "of 60 s"
    unsent = [row for row in rows if row["error"] == "unsent"]
    assert all(row["sent_ns"] is None and row["scheduled_ns"] > 0.2e9 for row in unsent)


def begin_to_stop(fake_server, start, tmp_path, **spec):
    """A run of 1,000 requests over 20 s, each half a second long, after the first 16 answers."""
    server = fake_server("--ttft", "0.1", "--itl", "0.1")
    plan = write_plan(tmp_path / "plan.arrow", n=1000, gap_s=0.02, tokens=5)
    worker = start(server.url, plan, **spec).start()
    wait_for(lambda: len(server.truth()) > 15, 120, "answers")
    return worker


@pytest.mark.parametrize("how", ["stop", "sigterm", "eof", "ctrl-c and stop"])
def test_stopped_softly_what_is_in_flight_ends(fake_server: StartServer, start, tmp_path, how):
    worker = begin_to_stop(fake_server, start, tmp_path)
    if how == "stop":
        worker.tell("stop")
    elif how == "sigterm":
        worker.process.send_signal(signal.SIGTERM)
    elif how == "ctrl-c and stop":
        worker.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        worker.tell("stop")
    else:
        worker.process.stdin.close()
        worker.process.stdin = None
    _, end, rows = worker.end()
    assert (end["exit"], worker.process.returncode, len(rows)) == (None, 0, 1000)
    assert set(classes(rows)) == {None, "unsent"}
    assert classes(rows)[None] > 15


def test_a_second_stop_ends_at_once(fake_server: StartServer, start, tmp_path):
    worker = begin_to_stop(fake_server, start, tmp_path)
    worker.tell("stop")
    worker.process.send_signal(signal.SIGTERM)
    _, end, rows = worker.end()
    assert (end["exit"], len(rows)) == (None, 1000)
    stopped = [row for row in rows if row["error"] == "stopped"]
    assert len(stopped) > 5
    assert any(row["chunk_gap_ns"] for row in stopped), "what had come by then is kept"
    assert set(classes(rows)) == {None, "stopped", "unsent"}


def test_the_drain_has_a_deadline(fake_server: StartServer, start, tmp_path):
    server = fake_server()
    plan = write_plan(tmp_path / "plan.arrow", n=5)
    began = time.monotonic()
    worker = start(server.url, plan, drain_s=0.5, extra_body={"fault": "hang"}).start()
    time.sleep(0.5)
    worker.tell("stop")
    _, _, rows = worker.end()
    assert classes(rows) == {"stopped": 5}
    assert time.monotonic() - began < 120, "they would hang for ten minutes"


def test_a_plan_that_was_sent_whole_waits_for_every_answer(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "2")
    plan = write_plan(tmp_path / "plan.arrow", n=5)
    _, _, rows = start(server.url, plan, drain_s=0.1).start().end()
    assert classes(rows) == {None: 5}, "to cut off what is slow would flatter the server"


def test_told_to_stop_before_the_start(fake_server: StartServer, start, tmp_path):
    worker = start(fake_server().url, write_plan(tmp_path / "plan.arrow"))
    assert worker.ready()["requests"] == 40
    worker.tell("stop")
    _, end, rows = worker.end()
    assert (end["exit"], end["end_ns"] is None, classes(rows)) == (None, True, {"unsent": 40})


def test_told_to_stop_between_the_word_and_the_start(fake_server: StartServer, start, tmp_path):
    worker = start(fake_server().url, write_plan(tmp_path / "plan.arrow")).start(in_s=60)
    worker.tell("stop")
    assert classes(worker.end()[2]) == {"unsent": 40}


def test_a_server_killed_in_mid_run(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.05", "--itl", "0.02")
    worker = start(server.url, write_plan(tmp_path / "plan.arrow", n=400, gap_s=0.02, tokens=20)).start()
    wait_for(lambda: len(server.truth()) > 4, 120, "answers")
    server.process.kill()
    _, end, rows = worker.end()
    assert end["exit"] is None, "what a server does is in the rows; the worker itself is sound"
    assert set(classes(rows)) == {None, "cut", "connect"}
    assert len(rows) == 400


def test_rows_are_on_disk_while_it_runs(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    worker = start(server.url, write_plan(tmp_path / "plan.arrow", n=10_000, gap_s=0.01)).start()
    wait_for(lambda: worker.results.exists() and read_results(worker.results).num_rows > 60, 90, "rows")
    assert worker.process.poll() is None
    worker.process.kill()


def test_a_full_disk_stops_the_run_and_is_said(fake_server: StartServer, start, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    plan = write_plan(tmp_path / "plan.arrow", n=1000, gap_s=0.02)
    worker = start(server.url, plan, results="/dev/full").start()
    out = worker.process.stdout.read()
    end = json.loads(out.splitlines()[-1])
    assert "cannot write results" in end["exit"]
    assert "space" in end["exit"].lower()
    assert worker.process.wait(120) == 1


def test_a_reader_that_went_to_sleep_does_not_hold_up_the_run(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.02", "--itl", "0.002")
    plan = write_plan(tmp_path / "plan.arrow", n=700, gap_s=0.002, tokens=2)
    worker = start(server.url, plan).start()
    time.sleep(2)  # nobody reads
    _, end, rows = worker.end()
    assert (end["exit"], classes(rows)) == (None, {None: 700})
    assert end["end_ns"] < 12e9


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"plan": "/nowhere/plan.arrow"}, 1, "no such plan"), ({"mode": "sideways"}, 2, "mode"),
        ({"endpoint": "chat"}, 2, "token ids"), ({"base_urls": ["host:80"]}, 2, "base URL"),
        ({"base_urls": []}, 2, "base URL"), ({"results": "/nowhere/rows"}, 1, "cannot write"),
        ({"timeout_s": 0}, 2, "timeout_s"), ({"mode": "closed"}, 2, "concurrency"), ({"worker": "x"}, 2, "spec"),
    ],
)  # fmt: skip
def test_what_cannot_run_says_why_and_ends(start, tmp_path, change, code, word):
    plan = write_plan(tmp_path / "plan.arrow")
    worker = start("http://127.0.0.1:9/v1", plan if "plan" not in change else change.pop("plan"), **change)
    out, words = worker.process.communicate(timeout=120)
    end = json.loads(out.splitlines()[-1])
    assert (end["event"], end["rows"], worker.process.returncode) == ("end", 0, code), words
    assert word in end["exit"]
    assert "Traceback" not in words


def test_the_start_must_be_near(fake_server: StartServer, start, tmp_path):
    worker = start(fake_server().url, write_plan(tmp_path / "plan.arrow"))
    worker.ready()
    worker.tell("start 12345")
    out, _ = worker.process.communicate(timeout=120)
    assert "clock" in json.loads(out.splitlines()[-1])["exit"]


def test_the_key_works_and_is_told_to_nobody(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.01", FAKE_SERVER_API_KEY="sk-right-one")
    plan = write_plan(tmp_path / "plan.arrow", n=5)
    env = {**os.environ, "HARNESS_API_KEY": "sk-right-one"}
    worker = start(server.url, plan, env=env)
    worker.start()
    events, _, rows = worker.end()
    assert classes(rows) == {None: 5}
    assert "sk-right" not in json.dumps(events) + worker.words
    env["HARNESS_API_KEY"] = "sk-wrong-one"
    worker = start(server.url, plan, env=env, results=str(tmp_path / "second.arrows")).start()
    events, _, rows = worker.end()
    assert classes(rows) == {"auth": 5}
    assert "sk-wrong" not in json.dumps([events, rows]) + worker.words


def test_tls_works_in_a_process_that_locust_patched(start, tmp_path):
    from test_client import answer, read_request

    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
         "/CN=t", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=False, capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as encrypted:
            while read_request(encrypted):
                encrypted.sendall(answer(3))

    def accept():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    url = f"https://127.0.0.1:{listening.getsockname()[1]}/v1"
    plan = write_plan(tmp_path / "plan.arrow", n=10)
    _, _, rows = start(url, plan, tls_ca=str(tmp_path / "cert.pem")).start().end()
    listening.close()
    assert classes(rows) == {None: 10}, rows[0]["detail"]


def run_patched(tmp_path, url, plan, code, **spec):
    """The worker's main, with some code before it and its words after."""
    file = tmp_path / "spec.json"
    results = tmp_path / "rows.arrows"
    file.write_text(json.dumps({"worker": 0, "workers": 1, "plan": str(plan), "results": str(results), "mode": "closed",
                                "base_urls": [url], "model": "fake", "concurrency": 8, **spec}))  # fmt: skip
    modules = "harness.scenarios.worker as w, harness.scenarios.client.in_flight as l"
    program = f"import sys, gc, {modules}\n{code[0]}\nw.main(sys.argv[1:])\n{code[1]}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(file)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.readline()
    process.stdin.write(f"start {time.time_ns()}\n")
    process.stdin.flush()
    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    lines = process.stdout.read().splitlines()
    words = process.communicate()[1]
    watchdog.cancel()
    assert lines, f"it said nothing and ended with {process.returncode}: {words}"
    return lines, words


def test_a_bug_never_ends_as_a_run_that_looks_sound(fake_server: StartServer, tmp_path):
    plan = write_plan(tmp_path / "plan.arrow", timed=False)
    bug = "def bug(*_): raise LookupError('a bug')\nl.ParseQueue._finish = bug", ""
    lines, words = run_patched(tmp_path, fake_server("--ttft", "0.01").url, plan, bug)
    end = json.loads(lines[-1])
    assert "LookupError: a bug" in end["exit"]
    assert "Traceback" in words
    bug = (
        "def bug(*_): raise LookupError('a bug')\nl.ParseQueue.settle = bug",
        "",
    )  # not in a callback of the event loop
    lines, words = run_patched(tmp_path, fake_server("--ttft", "0.01").url, plan, bug)
    assert "LookupError: a bug" in json.loads(lines[-1])["exit"]
    assert "Traceback" in words
    bug = "def bug(*_): raise LookupError('a bug')\nw.Saturate.send_all = bug", ""
    lines, _ = run_patched(tmp_path, fake_server("--ttft", "0.01").url, plan, bug)
    assert "LookupError: a bug" in json.loads(lines[-1])["exit"]


def test_a_run_makes_no_garbage_that_only_the_collector_could_free(fake_server: StartServer, tmp_path):
    """The collector is off while a run lasts, so anything left per request would grow for hours."""
    plan = write_plan(tmp_path / "plan.arrow", n=600, timed=False, tokens=3)
    count = "gc.enable = lambda: None", "print('left', gc.collect())"
    lines, words = run_patched(tmp_path, fake_server("--ttft", "0.002", "--itl", "0.001").url, plan, count)
    assert json.loads(lines[-2])["exit"] is None, words
    assert int(lines[-1].split()[1]) < 600, "less than one object per request"


def test_a_worker_imports_nothing_it_has_no_use_for() -> None:
    """They were a third of its start; what Locust was given in their place is gone when somebody wants the real one."""
    code = """import sys
    import harness.scenarios.worker
    print(*sorted({'requests', 'urllib3', 'flask', 'zmq', 'pyarrow.compute', 'ssl', 'boto3', 'ray'} & {*sys.modules}))
    import requests
    print(requests.get)""".replace("\n    ", "\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found, real = done.stdout.splitlines()
    assert found == "ssl", "gevent patches it"
    assert real.startswith("<function get"), real


# -- as plain locustfiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "users", "timed"), [("replay", 1, True), ("saturate", 4, False)])
def test_as_a_plain_locustfile(fake_server: StartServer, tmp_path, file, users, timed):
    server = fake_server("--ttft", "0.03", "--itl", "0.005")
    plan = write_plan(tmp_path / "plan.arrow", n=30, timed=timed)
    rows = tmp_path / "rows.arrows"
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", f"scenarios/{file}.py", "--headless", "-u", str(users), "-r", str(users),
         "--host", server.url.removesuffix("/v1"), "--plan", str(plan), "--model", "fake", "--results", str(rows),
         "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stats = {(s["method"], s["name"]): s for s in json.loads(done.stdout)}
    assert stats["POST", "/completions"]["num_requests"] == 30
    assert stats["POST", "/completions"]["num_failures"] == 0
    ttft = stats["TTFT", "/completions"]
    assert ttft["num_requests"] == 30
    assert ttft["total_response_time"] / 30 == pytest.approx(30, abs=15)
    assert classes(read_results(rows).to_pylist()) == {None: 30}


def locust_for(run_time_s: int, url: str, tmp_path: Path) -> dict[str | None, int]:
    """Classes of the rows of a plan of 500 requests in 10 s that plain Locust ends after ``run_time_s``, or three times
    that where its user had not begun by then.
    """
    plan = write_plan(tmp_path / "plan.arrow", n=500, gap_s=0.02)
    rows = tmp_path / "rows.arrows"
    for limit_s in (run_time_s, 3 * run_time_s):
        done = subprocess.run(
            [sys.executable, "-m", "locust", "-f", "scenarios/replay.py", "--headless", "-u", "1", "--host", url,
             "--plan", str(plan), "--model", "fake", "--results", str(rows), "--run-time", f"{limit_s}s"],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if rows.is_file():
            break
    assert rows.is_file(), done.stderr
    return classes(read_results(rows).to_pylist())


def test_a_plain_locustfile_stopped_by_locust_has_all_rows(fake_server: StartServer, tmp_path):
    found = locust_for(3, fake_server("--ttft", "0.03", "--itl", "0.005").url, tmp_path)
    assert sum(found.values()) == 500
    assert found[None] > 0
    assert set(found) <= {None, "stopped", "unsent"}


@pytest.mark.alone
def test_a_plain_locustfile_stopped_before_it_could_begin_has_all_rows(tmp_path):
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = full.getsockname()[1]
    fill = [socket.socket() for _ in range(8)]
    for one in fill:  # then no connection comes about, and Locust's time is over before it is given up
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
    assert locust_for(2, f"http://127.0.0.1:{port}", tmp_path) == {"unsent": 500}
    for one in [*fill, full]:
        one.close()


def test_a_plain_locustfile_without_a_plan_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", "scenarios/replay.py", "--headless", "-u", "1",
         "--host", "http://127.0.0.1:9", "--plan", str(tmp_path / "none.arrow")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no such plan" in done.stderr
