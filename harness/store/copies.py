"""Copies of what is on S3, here: a file, a run, a sweep; and files that are to go there when they are done.

A sweep's folder is local, the store follows it file by file, and any machine can go on from there. Its ``sweep.json``
is replaced there by compare-and-swap after every step: of two harnesses at work on one sweep the second finds another
state than the one it would replace, and is refused.
"""

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

import msgspec

from harness import cache_dir
from harness.errors import UsageError
from harness.record.manifest import indented
from harness.store.follow import CLOSE_S, SENDER, Follower, Say, silent
from harness.store.objects import (
    StoreError,
    as_url,
    connect,
    disk_errors,
    download,
    exists,
    get,
    is_url,
    list_objects,
    put,
    upload,
)
from harness.sweep.state import STATE, SweepState, read_state

LOCAL_RUNS = Path("runs")
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,3}", re.ASCII)


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
    with disk_errors(url):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for stored in files:
                download(stored.url, partial / stored.name, client=client)
                os.utime(partial / stored.name, (stored.changed_s, stored.changed_s))
            partial.rename(folder)
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


class SweepStore:
    """Keeps the store up with a sweep's folder; without a URL it does nothing.

    Trouble with the store is said and stops nothing: `close` sends what is missing. Only `begin` raises, and `state`
    when another harness goes on with this very sweep.
    """

    def __init__(self, folder: Path, url: str | None, say: Say) -> None:
        self._folder, self._say = folder, say
        self._follower = Follower(folder, url, say, apart={STATE}) if url else None
        self._etag: str | None = None
        """Of the state that is there; null when there is none, or it is not known."""
        self._unsent = False

    def begin(self, state: SweepState) -> None:
        """Own the sweep and begin to follow. Raises `StoreError` when that cannot work or the name is taken."""
        if self._follower is None:
            return
        if state.revision:
            self.state(state)
        else:
            self._etag = put(indented(state), f"{self._follower.url}/{STATE}", client=self._follower.client)
            self._say(f"sending to {self._follower.url}")
        self._follower.start()

    def state(self, state: SweepState) -> None:
        """Replace the state that is there. Raises `UsageError` when it is another harness's."""
        if self._follower is None:
            return
        self._unsent = True
        with self._told():
            self._replace(state, self._follower)
        self._follower.flush()

    def _replace(self, state: SweepState, follower: Follower) -> None:
        """Raises `StoreError`, and `UsageError` for a step of another harness."""
        there = f"{follower.url}/{STATE}"
        try:
            if self._etag is not None:
                self._etag = put(indented(state), there, client=follower.client, replaces=self._etag)
                self._unsent = False
                return
        except StoreError as e:
            if not e.conflict:
                raise
        # The first step of this sitting, or one of our own arrived although its answer did not.
        found = get(there, client=follower.client)
        if found is not None:
            known = msgspec.json.decode(found[0], type=SweepState)
            if known.writer != state.writer and (self._etag is not None or known.revision > state.revision):
                raise UsageError(f"{follower.url}: another harness is at work on this sweep")
        self._etag = put(indented(state), there, client=follower.client, replaces=found[1] if found else None)
        self._unsent = False

    def set_aside(self, point: str) -> None:
        """What is there of a point goes: the folder has it under another name, under which it is sent."""
        with self._told():
            if self._follower is not None:
                self._follower.remove(point)

    def send(self, path: Path) -> None:
        with self._told():
            if self._follower is not None:
                upload(path, f"{self._follower.url}/{path.name}", client=self._follower.client, overwrite=True)

    def close(self, state: SweepState) -> bool:
        if self._follower is None:
            return True
        problem = self._follower.close(CLOSE_S)
        try:
            if self._unsent:
                self._replace(state, self._follower)
        except (StoreError, UsageError) as e:
            problem = problem or str(e)
        if problem:
            self._say(f"store: not all of the sweep is at {self._follower.url}: {problem}. All of it is in "
                      f"{self._folder}; harness sweep --resume sends what is missing")  # fmt: skip
        else:
            self._say(f"all of the sweep is at {self._follower.url}")
        return problem is None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StoreError as e:
            assert self._follower is not None
            self._follower.tell(e)


def come_home(url: str | Path, root: Path, say: Say) -> Path:
    """The local folder to go on with the sweep at ``url``: the one that is under ``root``, else a copy of the store's.

    Raises `UsageError` when the store knows of later steps than the folder that is here, `StoreError` when there is no
    sweep.
    """
    url = as_url(url)
    folder = root / url.rpartition("/")[2]
    found = get(f"{url}/{STATE}")
    if found is None:
        raise StoreError(url, "there is no sweep here; 'aws s3 ls' shows what there is")
    if not folder.exists():
        for note in restore(url, folder):
            say(f"{url}: {note}")
        say(f"{url}: copied to {folder}")
    elif msgspec.json.decode(found[0], type=SweepState).revision > read_state(folder).revision:
        raise UsageError(f"{folder}: {url} has later steps of this sweep: move the folder away, then its copy is made")
    return folder
