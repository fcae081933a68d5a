"""A test while it runs: its numbers add up, its page draws them, and its server gives nothing else to anyone."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, StartServer, gone, interrupt, start_harness, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.analysis.report.live import BINS, LiveRun, LiveTest
from harness.analysis.report.page import live_json, render_live
from harness.errors import UsageError
from harness.live import AT_ONCE, LiveServer
from harness.option_types import ADDRESS

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed (dev has it)")


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def live(clock: Clock, **options: Any) -> LiveRun:
    known: dict[str, Any] = {
        "run": "run-1", "model": "m", "requests": 50, "span_s": 60.0, "scheduled_s": np.arange(50.0), "slo": {},
        "attain": 0.99,
    }  # fmt: skip
    return LiveRun(LiveTest(**known | options), now=clock)


def counts(sent: int = 0, done: int = 0, failed: int = 0, in_flight: int = 0, tokens: int = 0, **samples: Any) -> Any:
    return {"sent": sent, "done": done, "failed": failed, "in_flight": in_flight, "output_tokens": tokens, **samples}


def charts(run: LiveRun) -> dict[str, Any]:
    return {chart["title"]: chart for chart in json.loads(live_json(run))["charts"]}


def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(page)
        for sample in family.samples
    }


# --------------------------------------------------------------------------------------------------------- the numbers


def test_rates_are_those_of_each_second() -> None:
    clock = Clock()
    run = live(clock)
    for second in range(10):
        clock.s = 100.0 + second + 0.5
        run.update(counts(sent=8 * (second + 1), done=4 * (second + 1), in_flight=4, tokens=80 * (second + 1)))
    clock.s = 110.0
    found = charts(run)
    planned, sent = found["Load"]["lines"]
    assert found["Load"]["x"] == [k + 0.5 for k in range(10)]
    assert sent["name"] == "sent" and sent["y"] == [8.0] * 10
    assert planned["y"] == [1.0] * 10, "the trace's own"
    assert found["In flight"]["lines"][0]["y"] == [4.0] * 10
    assert found["Output tokens"]["lines"][0]["y"] == [80.0] * 10
    assert "Input tokens" not in found and "KV cache" not in found, "nobody said"
    facts = dict(run.facts())
    assert facts["done"] == "40 of 50" and facts["req/s"] == "4" and facts["time"] == "10 s of 60 s"


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.1, 300.0), min_size=1, max_size=60))
def test_nothing_is_lost_when_the_axis_grows(waits: list[float]) -> None:
    clock, run, sent = Clock(), None, 0
    run = live(clock, scheduled_s=None)
    for wait in waits:
        clock.s += wait
        sent += 3
        run.update(counts(sent=sent, done=sent, tokens=7 * sent, ttft_s=[0.1, 0.2]))
    assert run._counts["sent"].sum() == sent and run._counts["output_tokens"].sum() == 7 * sent
    assert run._grids["ttft"].sum() == 2 * len(waits)
    assert sum(waits) < BINS * run._bin_s
    for chart in charts(run).values():
        assert all(len(line["y"]) == len(chart["x"]) <= BINS or "share of" in chart["title"] for line in chart["lines"])


def test_time_begins_with_the_common_start_of_the_load_workers() -> None:
    clock = Clock()
    run = LiveRun(live(clock).test, starts_in_s=1.0, now=clock)
    run.update(counts())
    assert dict(run.facts())["time"] == "0 s of 60 s"
    clock.s += 3.5
    run.update(counts(sent=6))
    clock.s += 0.5
    assert charts(run)["Load"]["lines"][1]["y"] == [0.0, 0.0, 6.0], "in the third second of the plan"


def test_servers_are_added_up_only_when_all_are_known() -> None:
    said: list[Any] = [{"running": 3.0, "waiting": 1.0, "kv_cache_usage": 0.25}, None]
    clock = Clock()
    run = live(clock, servers=lambda: said)
    run.update(counts(sent=1))
    clock.s += 1
    said[1] = {"running": 2.0, "waiting": 0.0, "kv_cache_usage": 0.75}
    run.update(counts(sent=2))
    clock.s += 1
    found = charts(run)
    lines = {line["name"]: line["y"] for line in found["In flight"]["lines"]}
    assert lines["server: running"] == [None, 5.0] and lines["server: waiting"] == [None, 1.0]
    assert found["KV cache"]["lines"][0]["y"] == [None, 0.75]


def test_the_limits_of_the_slo_are_marked_and_held_against_what_was_seen() -> None:
    clock = Clock()
    run = live(clock, slo={"ttft_p95": 0.5, "tpot": 0.05})
    run.update(counts(sent=100, done=100, ttft_s=[0.1] * 94 + [0.9] * 6, tpot_s=[0.01] * 100))
    clock.s += 3
    facts = dict(run.facts())
    assert re.fullmatch(r"(8[89]\d|9\d\d) ms of 500 ms", facts["TTFT p95"]), facts
    assert facts["TPOT p99"].endswith(" of 50 ms")
    marks = {(mark["label"], mark["at"]) for chart in charts(run).values() for mark in chart["marks"]}
    assert marks == {("SLO p95", 0.5), ("SLO p99", 0.05)}


@pytest.mark.parametrize("said", [{}, counts(), {"sent": None, "ttft_s": [], "quiet_s": {}}])
def test_a_page_can_be_had_before_anything_happens(said: Any) -> None:
    clock = Clock()
    run = live(clock, scheduled_s=None, span_s=None)
    for page in (render_live(run), live_json(run), run.metrics()):
        assert not re.search(r"\b(nan|NaN|None|Undefined)\b", page.split("<main>")[-1].split("</main>")[0])
    run.update(said)
    assert run.state() == "Starting" and charts(run)["Load"]["lines"][0]["y"] in ([0.0], [None])


# ----------------------------------------------------------------------------------------------------------- Prometheus


def test_metrics_say_what_was_counted_and_parse_as_prometheus_text() -> None:
    clock = Clock()
    run = live(clock, run='a"b\\c\nd', slo={"ttft_p99": 2.0})
    run.update(counts(sent=9, done=7, failed=2, in_flight=2, tokens=70, ttft_s=[0.04, 0.05, 3.0], quiet_s={0: 6.5}))
    families = {family.name: family for family in parser.text_string_to_metric_families(run.metrics())}
    assert all(family.documentation and family.type != "unknown" for family in families.values())
    found = {
        (name, *(v for k, v in labels if k != "run")): value for (name, labels), value in samples(run.metrics()).items()
    }
    assert {dict(labels)["run"] for _, labels in samples(run.metrics())} == {'a"b\\c\nd'}
    assert found["harness_requests_sent_total",] == 9
    assert found["harness_requests_total", "succeeded"] == 5 and found["harness_requests_total", "failed"] == 2
    assert found["harness_num_requests_running",] == 2 and found["harness_generation_tokens_total",] == 70
    assert found["harness_slo_limit_seconds", "ttft_p99"] == 2 and found["harness_server_silence_seconds", "0"] == 6.5
    bucket = "harness_time_to_first_token_seconds_bucket"
    assert [found[bucket, le] for le in ("0.02", "0.04", "0.06", "2.5", "5", "+Inf")] == [0, 1, 2, 2, 3, 3]
    assert found["harness_time_to_first_token_seconds_sum",] == pytest.approx(3.09)
    assert found["harness_time_to_first_token_seconds_count",] == 3
    assert families["harness_time_to_first_token_seconds"].type == "histogram"
    assert found["harness_run_over",] == 0
    run.end("over")
    assert "harness_run_over{" in run.metrics() and json.loads(live_json(run))["over"]


def test_every_query_of_the_dashboard_names_a_metric_that_there_is() -> None:
    run = live(Clock(), slo={"ttft": 1.0})
    run.update(counts(quiet_s={0: 1.0}))
    there = {name for name, _ in samples(run.metrics())}
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bharness_\w+", query)}
    assert len(queries) > 8 and asked <= there, asked - there
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and all(
        {"x", "y", "w", "h"} == panel["gridPos"].keys() for panel in board["panels"]
    )
    labels = {
        label
        for query in queries
        for inside in re.findall(r"{([^}]*)}", query)
        for label in re.findall(r"(\w+)=~?", inside)
    }
    assert labels <= {"run", "outcome"} and all(query.count("(") == query.count(")") for query in queries)


# ----------------------------------------------------------------------------------------------------------- the server


def ask(server: LiveServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
    connection.close()
    return found


PAGES = {"/": lambda: ("text/html", "page"), "/metrics": lambda: ("text/plain", "metrics"), "/bad": lambda: 1 / 0}


def test_the_server_answers_reads_of_its_own_names_only() -> None:
    with LiveServer(("127.0.0.1", 0), PAGES, public=["/metrics"]) as server:  # type: ignore[arg-type]
        status, body, headers = ask(server, "/?x=1")
        assert (status, body) == (200, b"page")
        assert headers["cross-origin-resource-policy"] == "same-origin" and headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers
        assert ask(server, "/", "HEAD")[:2] == (200, b"")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, "/", method)[0] == 501
        for path in ("/../etc/passwd", "/page", "/%2e%2e/"):
            assert ask(server, path)[0] == 404
        for host in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", ""):
            for path in ("/", "/metrics"):
                assert ask(server, path, Host=host)[0] == 403, "another name for 127.0.0.1 (DNS rebinding)"
        for host in ("localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
            assert ask(server, "/", Host=host)[0] == 200, "whatever the port: a tunnel has one of its own"
        assert ask(server, "/bad")[0] == 500
        assert ask(server, "/metrics")[1] == b"metrics"


def test_on_every_interface_only_metrics_are_for_all() -> None:
    with LiveServer(("0.0.0.0", 0), PAGES, public=["/metrics"]) as server:  # type: ignore[arg-type]
        assert ask(server, "/metrics", Host="10.0.0.7:9464")[0] == 200
        assert ask(server, "/", Host="10.0.0.7:9464")[0] == 403
        assert ask(server, "/", Host="localhost:9464")[0] == 200, "kubectl port-forward"


def test_clients_that_say_nothing_hold_up_nobody() -> None:
    with LiveServer(("127.0.0.1", 0), PAGES) as server:  # type: ignore[arg-type]
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(AT_ONCE - 1)]
        assert ask(server, "/")[0] == 200
        threads = threading.active_count()
        more = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * AT_ONCE)]
        wait_for(lambda: sum(_hung_up(one) for one in more) >= 2 * AT_ONCE, 60, "no more than so many at once")
        assert threading.active_count() <= threads + 2
        for one in (*silent, *more):
            one.close()
        wait_for(lambda: _answers(server), 60, "free again")


def _hung_up(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _answers(server: LiveServer) -> bool:
    try:
        return ask(server, "/")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_a_port_in_use_is_said_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"--live 0 takes any free port"):
            LiveServer(("127.0.0.1", taken.getsockname()[1]), {})


@pytest.mark.parametrize(
    ("text", "address"), [("9464", "127.0.0.1:9464"), ("0.0.0.0:0", "0.0.0.0:0"), (":80", "127.0.0.1:80")]
)
def test_addresses(text: str, address: str) -> None:
    assert ADDRESS.convert(text, None, None) == address


@pytest.mark.parametrize("text", ["trace.jsonl", "70000", "host:", "", "-1"])
def test_what_is_no_address_says_how_to_write_one(text: str) -> None:
    with pytest.raises(Exception, match="without a value the option goes last"):
        ADDRESS.convert(text, None, None)


# ------------------------------------------------------------------------------------------------------ a run, watched


def test_a_run_is_watched_in_a_browser_and_scraped(fake_server: StartServer, browser: Any, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.03", "--itl", "0.004")
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f'{{"arrival_s": {k / 8}, "input_tokens": 9, "output_tokens": 9}}\n' for k in range(400)))
    out = tmp_path / "runs"
    run = start_harness("replay", trace, "--base-url", server.url, "--model", "fake", "-o", out, "--workers", "1",
                        "--slo", "ttft_p95=2s", "--live", "0")  # fmt: skip
    try:
        assert run.stderr is not None
        url = next(found[1] for line in run.stderr if (found := re.match(r"live: (http://127\.0\.0\.1:\d+/)", line)))

        def scrape() -> dict[str, float]:
            text = urllib.request.urlopen(url + "metrics", timeout=60).read().decode()
            return {name: value for (name, labels), value in samples(text).items() if len(labels) == 1}

        wait_for(lambda: scrape().get("harness_generation_tokens_total", 0) > 0, 120, "first tokens")
        first = scrape()
        assert first["harness_requests_planned"] == 400 and first["harness_num_requests_running"] <= 400

        context = browser.new_context(viewport={"width": 1200, "height": 900})
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda m: said.append(m.text))
        tab.on("pageerror", lambda e: said.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url))
        tab.goto(url)
        drawn = "() => [...document.querySelectorAll('canvas')].length"
        wait_for(lambda: tab.evaluate(drawn) >= 6, 120, "charts")
        assert {"Load", "In flight", "TTFT", "TPOT"} <= {
            words.split(",")[0] for words in tab.locator("figcaption > span").all_inner_texts()
        }
        before = tab.inner_text("#facts dd")
        wait_for(lambda: tab.inner_text("#facts dd") != before, 120, "the page renews itself")
        assert tab.inner_text("#say") == "Running"
        assert "of 2 s" in tab.inner_text("#facts")
        points = "() => window.report.charts.find((c) => c.title === 'Load').x.length"
        now = tab.evaluate(points)
        wait_for(lambda: tab.evaluate(points) > now, 120, "the time line grows")
        assert said == [] and all(one.startswith((url, "data:,")) for one in asked), (said, asked)
        interrupt(run)
        interrupt(run)  # with the page open: it says that nobody is there any more
        wait_for(lambda: tab.inner_text("#say").startswith("Gone"), 120, "the end is said")
        context.close()
    finally:
        run.kill()
        run.communicate()
    assert gone(run.pid)
