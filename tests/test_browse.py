"""A folder of runs in a browser: every view there is, nothing but that folder, and nobody but this machine."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import msgspec
import pytest
from conftest import ROOT, wait_for
from run_files import SPEC, TIER, bad, good, write_run
from test_page import EVIL, Page, browser, ink  # noqa: F401 - a fixture

from analysis.report import browse
from analysis.report.browse import Results
from harness.cli.results import serve
from harness.errors import ResultsError, UsageError
from harness.record.manifest import MANIFEST


@pytest.fixture
def folder(tmp_path):
    """Three good runs of different prices and loads, one of them in a sweep's folder, an INVALID one, a broken one."""
    root = tmp_path / "runs"
    slo = replace(SPEC, slo={"ttft": 0.2})
    write_run(root / "20261121T000001Z-a", [good(i, lag_ms=1) for i in range(400)], spec=slo)
    write_run(root / "20261121T000002Z-b", [good(i, ttft_ms=90) for i in range(60)], tier=replace(TIER, name="big"))
    write_run(root / "sweep" / "20261121T000003Z-c", [good(i, ttft_ms=300) for i in range(400)], spec=slo)
    write_run(root / "20261121T000004Z-d", [good(0)], status="failed", reason="it broke", model=EVIL)
    broken = write_run(root / "20261121T000005Z-e", [good(0)])
    (broken / "plan.arrow").write_bytes(b"no")
    (root / "notes").mkdir()
    (root / "secret.txt").write_text("secret")
    return root


@pytest.fixture
def served(folder):
    server = serve(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(120)
    assert not thread.is_alive()


def get(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


# -------------------------------------------------------------------------------------------------------- the folder


def test_runs_are_found_newest_first_and_below_a_sweep(folder):
    assert list(Results(folder).runs()) == [
        "20261121T000005Z-e", "20261121T000004Z-d", "sweep/20261121T000003Z-c", "20261121T000002Z-b",
        "20261121T000001Z-a",
    ]  # fmt: skip


def test_a_run_itself_can_be_opened_and_links_are_not_followed(folder, tmp_path):
    assert list(Results(folder / "20261121T000001Z-a").runs()) == ["20261121T000001Z-a"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(folder)
    assert Results(tmp_path / "other").runs() == {}


def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(ResultsError):
        Results(folder / "secret.txt")


def test_a_run_is_analysed_once_until_its_files_change(folder, monkeypatch):
    read = []
    monkeypatch.setattr(browse, "read_run", lambda path, was=browse.read_run: (read.append(path.name), was(path))[1])
    results = Results(folder)
    key = "20261121T000001Z-a"
    assert results.view(key) is results.view(key)
    assert len(read) == 1
    manifest = folder / key / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert key in results.waiting()
    results.view(key)
    assert len(read) == 2


def test_only_the_last_views_are_kept_but_every_line_stays(folder, monkeypatch):
    monkeypatch.setattr(browse, "MOST_VIEWS", 1)
    results = Results(folder)
    for key in ("20261121T000001Z-a", "20261121T000002Z-b"):
        results.view(key)
    assert len(results._views) == 1
    assert results.waiting() == ["20261121T000005Z-e", "20261121T000004Z-d", "sweep/20261121T000003Z-c"]


# ---------------------------------------------------------------------------------------------------------- the server


def test_the_list_has_every_run_with_its_figures(served):
    status, html, headers = get(served, "/")
    page = Page(html)
    assert status == 200
    assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
    for words in ("20261121T000001Z-a", "sweep/20261121T000003Z-c", "5 runs", "VALID", "SLO missed", "INVALID", "big",
                  "unreadable", "not a whole plan file"):  # fmt: skip
        assert words in page.text, words
    assert "still being analysed" not in page.text
    assert "form-action 'self'" in page.policy and "default-src 'none'" in page.policy
    rows = re.findall(r"<tr><td[^>]*><input.*?</tr>", html, re.DOTALL)
    prices = {re.search(r"<bdi>(2026[^<]*|sweep[^<]*)</bdi>", row)[1]: row.count("data-sort") for row in rows}
    assert prices["20261121T000001Z-a"] == 3  # load, ttft p99, price
    assert prices["20261121T000002Z-b"] == 2  # too few requests for p99
    assert prices["20261121T000004Z-d"] == 0  # INVALID and of one request: no load, no p99, no price


def test_each_run_has_its_page_with_the_way_back(served):
    for path in ("/run/20261121T000001Z-a", "/run/sweep/20261121T000003Z-c"):
        status, html, _ = get(served, path)
        assert status == 200
        assert "Latency, ms" in Page(html).text
        assert ("a", {"href": "/"}) in Page(html).elements


def test_several_runs_are_compared(served):
    status, html, _ = get(served, "/compare?run=20261121T000001Z-a&run=sweep%2F20261121T000003Z-c")
    assert status == 200
    assert "2 runs compared" in html
    for query in ("", "?run=20261121T000001Z-a", "?run=20261121T000001Z-a" * 2, "?" + "run=x&" * 2):
        assert get(served, "/compare" + query)[0] in (400, 404)
    assert get(served, "/compare?" + "&".join(f"run={i}" for i in range(99)))[0] == 400


@pytest.mark.parametrize(
    "path",
    ["/run/../secret.txt", "/run/%2e%2e/secret.txt", "/run/..%2fsecret.txt", "/run//etc/passwd", "/run/notes", "/run/",
     "/secret.txt", "/../secret.txt", "/run/20261121T000001Z-a/run.json", "/run/20261121T000001Z-a/../../secret.txt",
     "/run/%00", "/run/" + "a" * 5000, "/run/%ff%fe", "//evil.example/", "/favicon.ico"],
)  # fmt: skip
def test_nothing_but_the_runs_can_be_had(served, path):
    status, html, _ = get(served, path)
    assert status == 404
    assert "secret" not in html.replace("secret.txt", "")
    assert "Traceback" not in html


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "[::1]:{port}"]
)
def test_other_host_names_are_refused(served, host):
    """DNS rebinding: a page of another site that has its own name point here still sends that name."""
    status, html, _ = get(served, "/", Host=host.format(port=served.port))
    assert status == 421
    assert "20261121" not in html
    assert get(served, "/", Host=f"localhost:{served.port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_it_is_read_only(served, method):
    assert get(served, "/", method)[0] == 501


def test_it_listens_on_loopback_only(served):
    assert served.server_address[0] == "127.0.0.1"
    with pytest.raises(UsageError, match="another --port"):
        serve(served.results._folder, served.port)


def test_a_silent_client_holds_up_nobody(served):
    with socket.create_connection(("127.0.0.1", served.port)) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert get(served, "/")[0] == 200


def test_a_run_that_cannot_be_read_says_why(served):
    status, html, _ = get(served, "/run/20261121T000005Z-e")
    assert status == 404
    assert "not a whole plan file" in Page(html).text


def test_an_empty_folder_is_a_page_too(tmp_path):
    assert "No run in this folder yet" in Results(tmp_path).list_page()


def test_ctrl_c_ends_it(folder):
    # A process that a shell put in the background would ignore SIGINT, and so would its children.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from harness.cli.results import open_; from pathlib import Path; "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "sys.exit(open_.callback(Path(sys.argv[1]), 0))", str(folder)],
        cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        connection = http.client.HTTPConnection(url[7:-1], timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "Traceback" not in words
    finally:
        process.kill()
        process.wait(120)


# --------------------------------------------------------------------------------------------------------- in a browser


def test_browser_sorts_opens_and_compares(browser, served):  # noqa: F811 - the fixture
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    said, asked = [], []
    try:
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda m: said.append(m.text))
        tab.on("pageerror", lambda e: said.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url))
        tab.goto(served.url)
        names = tab.locator("tbody th")
        assert names.count() == 5
        assert tab.evaluate("window.hacked") is None
        head = tab.locator("thead th", has_text="USD per 1M")
        head.locator("button").first.click()
        assert head.get_attribute("aria-sort") == "ascending"
        prices = tab.locator("tbody tr").evaluate_all(
            "rows => rows.map((r) => r.cells[8].dataset.sort === undefined ? null : +r.cells[8].dataset.sort)"
        )
        known = [price for price in prices if price is not None]
        assert len(known) == 3 and known == sorted(known) and prices[3:] == [None, None]
        tab.get_by_role("link", name="20261121T000001Z-a").click()
        wait_for(lambda: tab.evaluate("document.querySelectorAll('canvas').length > 0"), 120, "a chart")
        assert min(ink(tab)) > 0.005
        tab.get_by_role("link", name="All runs").click()
        for name in ("20261121T000001Z-a", "sweep/20261121T000003Z-c"):
            tab.get_by_label(f"Compare {name}").check()
        tab.get_by_role("button", name="Compare the ticked runs").click()
        wait_for(lambda: "2 runs compared" in tab.title(), 120, "the comparison")
        assert said == []
        assert asked and all(url.startswith((served.url, "data:,")) for url in asked), asked
    finally:
        context.close()


def test_hostile_run_names_stay_text(tmp_path):
    name = 'x"><script>window.hacked=1<'
    write_run(tmp_path / name, [bad(0, detail=EVIL[:300])], model=EVIL)
    results = Results(tmp_path)
    html = results.list_page() + results.run_page(name)
    assert html.count("<script") == 4  # data and code of each page
    assert "\u202e" not in html
    assert msgspec.json.decode(re.search(r'id="data">(.*?)</script>', html)[1]) == []
