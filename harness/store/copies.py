"""Copies of what is on S3, here: a file, a run, a sweep; and files that are to go there when they are done."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.paths import cache_dir
from harness.store.errors import StoreError, disk_error
from harness.store.follow import SENDER, Say, silent
from harness.store.objects import (
    as_url,
    connect,
    download,
    exists,
    is_url,
    list_objects,
    upload,
)

LOCAL_RUNS = Path("runs")
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,3}", re.ASCII)
"""A file below a folder that is ours to write."""


def split_out(out: str | Path) -> tuple[Path, str | None]:
    """(folder for run directories on this machine, URL they go to or null) of what ``--out`` says."""
    return (LOCAL_RUNS, as_url(out)) if is_url(out) else (Path(out), None)


def restore(url: str, folder: Path, *, client: Any = None) -> list[str]:
    """Make the run directory or sweep ``folder`` from what the store has of it; returns what a reader has to know.

    Files keep the time at which they went up. Raises `StoreError` when there is nothing, or ``folder`` exists.
    """
    client = client or connect()
    found = list_objects(url, client=client)
    files = [stored for stored in found if NAME.fullmatch(stored.name)]
    if not files:
        raise StoreError(as_url(url), "there is no run here; 'aws s3 ls' shows what there is")
    if folder.exists():
        raise StoreError(url, f"{folder} exists already; nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for stored in files:
            download(stored.url, partial / stored.name, client=client)
            os.utime(partial / stored.name, (stored.changed_s, stored.changed_s))
        partial.rename(folder)
    except OSError as e:
        raise disk_error(url, e) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    unfinished = any(stored.name == SENDER for stored in found)
    return ["this run is still being sent, or its machine died before the end"] if unfinished else []


def local_copy(name: str | Path, say: Say = silent) -> Path:
    """Where this file, run directory or sweep lies on this machine: itself, or a verified copy of ``s3://...``.

    Copies are kept in the cache under what they were made of, so a second time costs a listing. Raises `StoreError`.
    """
    if not is_url(name):
        return Path(name)
    url, client = as_url(name), connect()
    found = list_objects(url, client=client, alone=True)
    state = hashlib.sha256(repr([(stored.url, stored.size, stored.etag) for stored in found]).encode()).hexdigest()
    kept = cache_dir() / "store" / state[:16] / url.rpartition("/")[2]
    notes = kept.with_name("notes.txt")
    if not kept.exists():
        if any(stored.url == url for stored in found):
            download(url, kept, client=client)
        else:
            lines = restore(url, kept, client=client)
            notes.write_text("".join(f"{line}\n" for line in lines))
    for line in notes.read_text().splitlines() if notes.exists() else ():
        say(f"{url}: {line}")
    say(f"{url}: copied to {kept}")
    return kept


@contextmanager
def output_file(output: str | Path) -> Iterator[Path]:
    """Where to write what is to be at ``output``: there, or for ``s3://...`` a temporary file that then goes up."""
    if not is_url(output):
        yield Path(output)
        return
    url = as_url(output)
    if exists(url):
        raise StoreError(url, "exists already; nothing is overwritten: choose another name")
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        path = Path(folder) / url.rpartition("/")[2]
        yield path
        upload(path, url)
