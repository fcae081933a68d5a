"""A run directory on its way to S3 while the run goes on.

The directory stays on this machine; a `Mirror` follows it. Below the run's URL lie:

==================================  ===================================================================================
FILE                                a whole file, verified
.parts/FILE/<16 digits>             bytes of a growing file from this offset on; of a file that is replaced: its
                                    versions, in order
.parts/.sender                      who sends; gone when every file is whole
==================================  ===================================================================================

So a run whose machine died can be put together from what had gone up (`harness.store.restore`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from harness.s3 import PART_BYTES, as_url, connect, delete, exists, list_objects, put, split_url, upload
from harness.s3_errors import StoreError

EVERY_S = 5.0
"""How often new bytes go up: what a dying machine can lose, besides what its workers had not flushed."""
CLOSE_S = 120.0
"""How long a store that fails is tried again at the end. (A transfer that goes on has its own deadline.)"""
RETRY_S = 5.0
MARK = "store.json"
"""In the run directory, when not all of it went up: what is missing and how to send it."""

PARTS = ".parts"
SENDER = f"{PARTS}/.sender"
LAST = "run.json"
"""Goes up last: where it is whole, the run is."""
GROWING = (".arrows", ".log")
REPLACED = (".json", ".toml", ".md", ".html")
WHOLE = (".arrow",)

Say = Callable[[str], None]


def silent(words: str) -> None:
    """Say nothing."""


class Mirror:
    """Follows a growing run directory: new bytes go up as parts every few seconds, whole files at the end.

    A thread does it, and the load never waits for it. Only files a run is made of are sent: an API key that was left
    beside them is not.
    """

    def __init__(self, run_dir: Path, url: str, say: Say = silent, *, every_s: float = EVERY_S) -> None:
        split_url(url)
        self.url = as_url(url)
        self._dir, self._say, self._every_s = run_dir, say, every_s
        self._client = connect()
        self._sent: dict[str, int] = {}
        """Of a growing file: bytes that are up. Of a replaced one: versions that are."""
        self._part_bytes: dict[str, int] = {}
        """Size of a part that may or may not have arrived: it is sent again with the same bytes."""
        self._seen: dict[str, str] = {}
        """SHA-256 of the newest version of a replaced file that is up."""
        self._whole: set[str] = set()
        self._trouble: str | None = None
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Claim the URL and begin. Raises `StoreError` when sending there cannot work; said only, when it may later."""
        try:
            if exists(f"{self.url}/{LAST}", client=self._client):
                raise StoreError(self.url, "holds a run already; nothing is overwritten")
            put(self._sender(), f"{self.url}/{SENDER}", client=self._client)
        except StoreError as e:
            if not e.transient:
                raise
            self._fail(e)
        else:
            self._say(f"sending to {self.url}")
        self._thread = threading.Thread(target=self._follow, name="harness-store", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Send now what is new, without waiting for it."""
        self._wake.set()

    def close(self, patience_s: float | None = None) -> bool:
        """Send what is left and every file as a whole, then remove the parts; whether all of it is there.

        A store that fails is tried again for ``patience_s`` (default `CLOSE_S`). What could not go up is marked in the
        directory. Ctrl-C gives up sending, not the run.
        """
        self._ending.set()
        self._wake.set()
        try:
            if self._thread is not None:
                self._thread.join()
            problem = self._finish(CLOSE_S if patience_s is None else patience_s)
        except KeyboardInterrupt:
            problem = "sending was stopped by the user"
        if problem is not None:
            self._mark(problem)
            return False
        (self._dir / MARK).unlink(missing_ok=True)
        self._say(f"all of the run is at {self.url}")
        return True

    def _finish(self, patience_s: float) -> str | None:
        """Null when every file is whole in the store, else what hinders."""
        give_up = time.monotonic() + patience_s
        while True:
            try:
                self._send_whole()
                break
            except OSError as e:
                return f"{e.filename or self._dir}: {e.strerror}"
            except StoreError as e:
                if not e.transient or time.monotonic() >= give_up:
                    return str(e)
                self._fail(e)
                time.sleep(RETRY_S)
        try:
            parts = [s for s in list_objects(self.url, client=self._client) if s.name.startswith(f"{PARTS}/")]
            delete(parts, client=self._client)
        except StoreError as e:
            self._say(f"store: the run is whole there, but its parts stay beside it: {e}")
        return None

    def _send_whole(self) -> None:
        for path in sorted(self._files(), key=lambda path: (path.name == LAST, path.name)):
            if path.name not in self._whole:
                upload(path, f"{self.url}/{path.name}", client=self._client)
                self._whole.add(path.name)

    def _follow(self) -> None:
        while not self._ending.is_set():
            self._wake.clear()
            try:
                for path in self._files():
                    self._send_new(path)
            except (StoreError, OSError) as e:
                self._fail(e)
            else:
                if self._trouble is not None:
                    self._trouble = None
                    self._say("store: reached again; nothing is missing")
            self._wake.wait(self._every_s)

    def _send_new(self, path: Path) -> None:
        """New bytes of a growing file, a new version of a replaced one, a file that never changes as a whole."""
        name, sent = path.name, self._sent.get(path.name, 0)
        if path.suffix in WHOLE:
            if name not in self._whole:
                upload(path, f"{self.url}/{name}", client=self._client)
                self._whole.add(name)
        elif path.suffix in REPLACED:
            data = path.read_bytes()
            if (digest := hashlib.sha256(data).hexdigest()) != self._seen.get(name):
                put(data, self._part(name, sent), client=self._client)
                self._sent[name], self._seen[name] = sent + 1, digest
        else:
            with path.open("rb") as file:
                file.seek(sent)
                while not self._ending.is_set() and (data := file.read(self._part_bytes.get(name, PART_BYTES))):
                    self._part_bytes[name] = len(data)
                    put(data, self._part(name, sent), client=self._client)
                    sent += len(data)
                    self._sent[name] = sent
                    del self._part_bytes[name]

    def _part(self, name: str, number: int) -> str:
        return f"{self.url}/{PARTS}/{name}/{number:016d}"

    def _files(self) -> list[Path]:
        """Small files first: a large plan must not hold back the rows."""
        kinds = (*REPLACED, *GROWING, *WHOLE)
        found = [path for path in self._dir.iterdir() if path.suffix in kinds and not path.name.startswith(".")]
        return sorted((path for path in found if path.name != MARK), key=lambda path: kinds.index(path.suffix))

    def _fail(self, e: Exception) -> None:
        """Say each new trouble once."""
        if str(e) != self._trouble:
            self._trouble = str(e)
            goes_on = "Ctrl-C gives up sending" if self._ending.is_set() else "the run goes on"
            self._say(f"store: {e}; {goes_on}, and this is tried again")

    def _mark(self, problem: str) -> None:
        missing = [path.name for path in self._files() if path.name not in self._whole]
        where = self.url.rpartition("/")[0]
        command = shlex.join([sys.executable, "-m", "harness.store", str(self._dir.resolve()), where])
        mark = {"url": self.url, "problem": problem, "missing": missing, "send": command}
        try:
            (self._dir / MARK).write_text(json.dumps(mark, indent=2) + "\n")
        except OSError as e:
            self._say(f"store: {self._dir / MARK}: cannot write ({e.strerror})")
        self._say(f"store: not all of the run is at {self.url}: {problem}")
        self._say(f"  missing there: {', '.join(missing)}; all of it is in {self._dir}. Send it later: {command}")

    def _sender(self) -> bytes:
        sender = {"host": platform.node(), "pid": os.getpid(), "folder": str(self._dir.resolve()),
                  "since": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
        return json.dumps(sender).encode()
