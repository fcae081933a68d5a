"""Captured answers: off by default, by request id, without text unless it is asked for, the key nowhere."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, StartServer
from test_worker import write_plan

from harness.errors import ResultsError
from harness.record.answers import KEY_VARIABLE, CapturedWriter, read_captured, unseal
from harness.record.results import read_results
from harness.record.run_spec import DEFAULTS

KEY = bytes(range(32))


def work(folder: Path, url: str, capture: str) -> str:
    """One worker on ten requests; what it said on stderr."""
    plan = write_plan(folder / "plan.arrow", n=10, timed=False, tokens=3)
    spec = folder / "worker-0.json"
    spec.write_text(json.dumps({
        "worker": 0, "plan": str(plan), "results": str(folder / "results-0.arrows"), "mode": "closed",
        "concurrency": 2, "base_urls": [url], "model": "fake", "capture": capture,
        "captured": str(folder / "answers-0.arrows"),
    }))  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "harness.scenarios.worker", str(spec)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, KEY_VARIABLE: KEY.hex()},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"start {time.time_ns()}\n")
        process.stdin.flush()
        said = process.stdout.read()  # the end of stdin would stop it
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("capture", ["off", "hmac", "text", "sealed"])
def test_a_worker_stores_what_was_asked_for_and_no_more(fake_server: StartServer, tmp_path: Path, capture: str) -> None:
    said = work(tmp_path, fake_server("--ttft", "0.001", "--itl", "0.001").url, capture)
    file = tmp_path / "answers-0.arrows"
    assert file.exists() is (capture != "off")
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert KEY not in content and KEY.hex().encode() not in content
    assert KEY.hex() not in said
    if capture == "off":
        return
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    rows = read_captured(file).to_pylist()
    good = [row["request_id"] for row in read_results(tmp_path / "results-0.arrows").to_pylist() if not row["error"]]
    assert sorted(row["request_id"] for row in rows) == sorted(good) == list(range(10))
    assert all((row["text"] is None) is (capture == "hmac") for row in rows)
    if capture == "text":
        assert all(row["text"] for row in rows)
        assert all(row["hmac"] == hmac.digest(KEY, row["text"].encode(), "sha256") for row in rows)
    if capture == "sealed":
        assert b" t t t" not in file.read_bytes()
        opened = [unseal(row["text"], KEY) for row in rows]
        assert opened == [" t t t"] * 10 and len({row["text"] for row in rows}) == 10
        assert all(
            row["hmac"] == hmac.digest(KEY, text.encode(), "sha256") for row, text in zip(rows, opened, strict=True)
        )
        assert all(unseal(row["text"], KEY[::-1]) != " t t t" for row in rows)


def test_a_digest_is_keyed_and_equal_only_for_equal_text(tmp_path: Path) -> None:
    for name, key in (("a", KEY), ("b", KEY[::-1])):
        writer = CapturedWriter(tmp_path / name, key, keep_text=False)
        for i, text in enumerate(["x", "y", "x", "", "\ud83d"]):
            writer.append(i, text)
        writer.close()
        writer.close()
    a, b = (read_captured(tmp_path / name).column("hmac").to_pylist() for name in "ab")
    assert a[0] == a[2] != a[1] and not set(a) & set(b)
    assert hashlib.sha256(b"x").digest() not in a
    with pytest.raises(FileExistsError):
        CapturedWriter(tmp_path / "a", KEY, keep_text=False)


def test_a_file_that_was_cut_short_gives_its_whole_batches(tmp_path: Path) -> None:
    writer = CapturedWriter(tmp_path / "file", KEY, keep_text=True)
    writer.append(1, "one")
    writer.flush()
    size = (tmp_path / "file").stat().st_size
    writer.append(2, "two")
    writer.close()
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[: size + 20])
    assert read_captured(tmp_path / "file").to_pylist()[0]["text"] == "one"
    (tmp_path / "other").write_bytes(b"no")
    for name in ("other", "missing"):
        with pytest.raises(ResultsError):
            read_captured(tmp_path / name)


def test_nothing_is_captured_unless_it_is_asked_for() -> None:
    assert DEFAULTS.capture == "off"


def test_a_copy_from_another_host_is_private_too(tmp_path: Path) -> None:
    from harness.cluster.deploy.remote import RemoteWorker

    file = tmp_path / "answers-0.arrows"
    worker = object.__new__(RemoteWorker)  # without an actor: only what came is of interest
    worker._files, worker._offsets = {file.name: file}, {file.name: 0}
    umask = os.umask(0o022)
    try:
        for piece in (b"one", b"two"):
            worker.keep({file.name: piece})
    finally:
        os.umask(umask)
    assert file.read_bytes() == b"onetwo"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
