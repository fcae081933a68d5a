"""Datasets of the Hugging Face Hub as traces, from a hub of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from harness.errors import TraceError
from harness.trace.hub import CONVERTED
from harness.trace.io import open_trace

ROWS = {"arrival_s": [0.0, 0.5, 1.0], "input_tokens": [10, 20, 30], "output_tokens": [1, 2, 3]}
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as its own library asks for: a listing, and files with their facts in headers."""

    files: dict[tuple[str, str], bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        revision = CONVERTED if CONVERTED in path else "main"
        tree = "/api/datasets/org/name/tree/"
        if path.startswith("/api/datasets/org/name") and not path.startswith(tree):
            names = [{"rfilename": name} for (of, name) in self.files if of == revision]
            return self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": names}).encode())
        if path.startswith(tree):
            rows = [{"type": "file", "path": name, "size": len(data), "oid": "a" * 40}
                    for (of, name), data in self.files.items() if of == revision]  # fmt: skip
            return self.answer(json.dumps(rows).encode())
        name = path.removeprefix(f"/datasets/org/name/resolve/{revision}/")
        if (data := self.files.get((revision, name))) is None:
            self.send_response(404)
            self.send_header(
                "X-Error-Code", "EntryNotFound" if path.startswith("/datasets/org/name") else "RepoNotFound"
            )
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.answer(data)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, data: bytes) -> None:
        self.send_response(200)
        for key, value in {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hash(data):x}"',
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *said: object) -> None: ...


def as_parquet(folder: Path, **columns: Any) -> bytes:
    path = folder / "rows.parquet"
    parquet.write_table(pa.table(columns or ROWS), path)
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, str], bytes]]:
    files: dict[tuple[str, str], bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield files
    server.shutdown()
    server.server_close()


def lengths(url: str) -> list[tuple[float | None, int | None]]:
    return [(row.arrival_s, row.input_tokens) for row in open_trace(Path(url))]


def test_a_split_is_read_from_the_parquet_that_the_hub_makes(hub: dict[tuple[str, str], bytes], tmp_path: Path) -> None:
    hub[CONVERTED, "default/train/0000.parquet"] = as_parquet(tmp_path)
    hub[CONVERTED, "default/train/0001.parquet"] = as_parquet(
        tmp_path, arrival_s=[2.0], input_tokens=[40], output_tokens=[4]
    )
    hub[CONVERTED, "default/test/0000.parquet"] = as_parquet(
        tmp_path, arrival_s=[0.0], input_tokens=[7], output_tokens=[7]
    )
    assert lengths("hf://datasets/org/name:train") == [(0.0, 10), (0.5, 20), (1.0, 30), (2.0, 40)]
    assert lengths("hf://datasets/org/name/default:test") == [(0.0, 7)]
    with pytest.raises(TraceError, match=r"several parts: name one: .*name/default:test, .*name/default:train"):
        lengths("hf://datasets/org/name")
    with pytest.raises(TraceError, match=r"no such part: .*default:train"):
        lengths("hf://datasets/org/name:validation")


def test_a_file_is_read_as_it_is(hub: dict[tuple[str, str], bytes]) -> None:
    hub["main", "data/log.jsonl"] = b'{"arrival_s": 3.0, "input_tokens": 5, "output_tokens": 2}\n'
    assert [tokens for _, tokens in lengths("hf://datasets/org/name/data/log.jsonl")] == [5]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hf://models/org/name", "expected hf://datasets/ORG/NAME"),
        ("hf://datasets/name", "expected hf://datasets/ORG/NAME"),
        ("hf://datasets/org/name/missing.jsonl", "cannot read from the Hugging Face Hub"),
        ("hf://datasets/org/name:train", "no Parquet file"),
    ],
)
def test_what_is_not_there_is_said(hub: dict[tuple[str, str], bytes], url: str, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        lengths(url)
