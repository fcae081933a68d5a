"""A folder on its way to S3 while it grows: what changed goes up every few seconds, each file as a whole.

The folder stays on this machine; a `Follower` follows it. Its files lie below the URL under their own names,
``run.json`` sent last; ``.sender`` beside them says who sends, and is gone when every file is up. So a machine that
dies loses what came since the last round, and any machine can bring back the rest (`harness.store.copies`).
Captured answers (``answers-<worker>.arrows``, `harness.record.answers`) are not sent, since they are the text of users:
copy them yourself if they are to go there.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from harness.errors import EXIT_FAILURE, EXIT_USAGE, EXIT_VALID, HarnessError
from harness.store.objects import StoreError, as_url, connect, delete, exists, is_url, list_objects, put, upload

EVERY_S = 5.0
"""How often what changed goes up; less often where a round takes longer than a quarter of it."""
CLOSE_S = 120.0
"""How long a store that fails is tried again at the end. (A transfer that goes on has its own deadline.)"""
RETRY_S = 5.0
MARK = "store.json"
"""In the run directory, when not all of it went up: what is missing and how to send it."""
SENDER = ".sender"
LAST = "run.json"
"""Goes up last in a round: what it says of a run, the run has."""
KINDS = (".json", ".toml", ".md", ".html", ".arrows", ".log", ".arrow")
"""Endings of the files a run is made of, small ones first: a large plan must not hold back the rows."""
CAPTURED = "answers-*.arrows"

Say = Callable[[str], None]


def silent(words: str) -> None:
    """Say nothing."""


class Follower:
    """Sends what changed in a folder from a thread; the load never waits for it.

    Only files a run is made of are sent: an API key that was left beside them is not, nor are captured answers.
    ``apart``: names that another sends.
    """

    def __init__(
        self, folder: Path, url: str, say: Say = silent, *, every_s: float = EVERY_S, apart: Collection[str] = ()
    ) -> None:
        self.url, self.client = as_url(url), connect()
        self._folder, self._say, self._every_s, self._apart = folder, say, every_s, apart
        self._sent: dict[Path, tuple[int, int]] = {}
        self.overwrite = True
        """False: the files up there are of a whole run, and only the same ones are as good."""
        self._trouble: str | None = None
        self._one = threading.Lock()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self) -> None:
        """Be the only one who sends there. Raises `StoreError`; said only, when it may work later."""
        try:
            if exists(f"{self.url}/{LAST}", client=self.client):
                raise StoreError(self.url, "holds a run already; nothing is overwritten")
            sender = {"host": platform.node(), "pid": os.getpid(), "folder": str(self._folder.resolve()),
                      "since": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
            put(json.dumps(sender).encode(), f"{self.url}/{SENDER}", client=self.client)
        except StoreError as e:
            if not e.transient:
                raise
            self.tell(e)
        else:
            self._say(f"sending to {self.url}")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._follow, name="harness-store", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Send now what is new, without waiting for it."""
        self._wake.set()

    def close(self, patience_s: float) -> str | None:
        """Send what is left; null when every file is up, else what hinders. A store that fails is tried for so long,
        and Ctrl-C gives up sending.
        """
        self._ending.set()
        self._wake.set()
        give_up = time.monotonic() + patience_s
        try:
            if self._thread is not None:
                self._thread.join()
            while True:
                try:
                    for path in self.missing():
                        self._send(path)
                    return None
                except StoreError as e:
                    if not e.transient or time.monotonic() >= give_up:
                        return str(e)
                    self.tell(e)
                    time.sleep(RETRY_S)
        except OSError as e:
            return f"{e.filename or self._folder}: {e.strerror}"
        except KeyboardInterrupt:
            return "sending was stopped by the user"

    def remove(self, name: str) -> None:
        """Take away what is there under this name, which is another one in the folder now. Raises `StoreError`."""
        with self._one:  # a file that is on its way under its old name has arrived
            # A plan that takes its place is a link to the same bytes: its size and time tell nothing.
            self._sent = {p: state for p, state in self._sent.items() if not p.is_relative_to(self._folder / name)}
            delete(
                [stored.url for stored in list_objects(f"{self.url}/{name}", client=self.client)], client=self.client
            )

    def missing(self) -> list[Path]:
        """Files that are not up as they are now, in the order to send them."""
        found = []
        for path in self._folder.rglob("*"):
            inside = path.relative_to(self._folder)
            ours = path.suffix in KINDS and not path.match(CAPTURED) and path.name != MARK
            if ours and not any(part.startswith(".") for part in inside.parts) and str(inside) not in self._apart:
                state = _state(path)
                if state is not None and self._sent.get(path) != state:
                    found.append(path)
        return sorted(found, key=lambda path: (path.name == LAST, KINDS.index(path.suffix), path))

    def tell(self, e: Exception) -> None:
        if str(e) != self._trouble:
            self._trouble = str(e)
            goes_on = "Ctrl-C gives up sending" if self._ending.is_set() else "the run goes on"
            self._say(f"store: {e}; {goes_on}, and this is tried again")

    def _send(self, path: Path) -> None:
        with self._one:
            if (state := _state(path)) is not None:  # else it was set aside meanwhile
                there = f"{self.url}/{path.relative_to(self._folder)}"
                upload(path, there, client=self.client, overwrite=self.overwrite)
                self._sent[path] = state

    def _follow(self) -> None:
        while not self._ending.is_set():
            self._wake.clear()
            began = time.monotonic()
            try:
                for path in self.missing():
                    if self._ending.is_set():
                        return
                    self._send(path)
            except (StoreError, OSError) as e:
                self.tell(e)
            else:
                if self._trouble is not None:
                    self._trouble = None
                    self._say("store: reached again; nothing is missing")
            self._wake.wait(max(self._every_s, 4 * (time.monotonic() - began)))


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file; null when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_size, found.st_mtime_ns) if path.is_file() else None


@contextmanager
def mirrored(url: str | None, run_dir: Path, say: Say = silent) -> Iterator[None]:
    """Send the run directory to ``<url>/<its name>`` while the block runs, and whole at its end; null: do nothing.

    Enter when the plan is in the directory: what cannot work raises `StoreError` here, and nothing does from then on.
    """
    if url is None:
        yield
        return
    follower = Follower(run_dir, f"{as_url(url)}/{run_dir.name}", say)
    follower.claim()
    follower.start()
    try:
        yield
    finally:
        finish(follower, run_dir, say)


def finish(follower: Follower, run_dir: Path, say: Say) -> bool:
    """Send what is left; whether all of it is there. If not, that is said, and marked in the directory."""
    problem = follower.close(CLOSE_S)
    if problem is None:
        try:
            delete([f"{follower.url}/{SENDER}"], client=follower.client)
        except StoreError as e:
            say(f"store: all is there, but {SENDER} stays beside it: {e}")
        (run_dir / MARK).unlink(missing_ok=True)
        say(f"all of the run is at {follower.url}")
        return True
    missing = [path.name for path in follower.missing()]
    where = follower.url.rpartition("/")[0]
    command = shlex.join([sys.executable, "-m", "harness.store", str(run_dir.resolve()), where])
    mark = {"url": follower.url, "problem": problem, "missing": missing, "send": command}
    try:
        (run_dir / MARK).write_text(json.dumps(mark, indent=2) + "\n")
    except OSError as e:
        say(f"store: {run_dir / MARK}: cannot write ({e.strerror})")
    say(f"store: not all of the run is at {follower.url}: {problem}")
    say(f"  missing there: {', '.join(missing)}; all of it is in {run_dir}. Send it later: {command}")
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m harness.store RUN_DIRECTORY s3://BUCKET/PREFIX``: exit status 0 when all of it is there."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 2 or not is_url(arguments[1]):
        print("usage: python -m harness.store RUN_DIRECTORY s3://BUCKET/PREFIX", file=sys.stderr)
        return EXIT_USAGE

    def say(words: str) -> None:
        print(words, file=sys.stderr)

    run_dir, url = Path(arguments[0]).resolve(), as_url(arguments[1])
    try:
        if not (run_dir / LAST).is_file():
            raise StoreError(url, f"{run_dir} is not a run directory: it has no {LAST}")
        follower = Follower(run_dir, f"{url}/{run_dir.name}", say)
        whole = exists(f"{follower.url}/{LAST}") and not exists(f"{follower.url}/{SENDER}")
        follower.overwrite = not whole
        return EXIT_VALID if finish(follower, run_dir, say) else EXIT_FAILURE
    except HarnessError as e:
        print(f"harness: {e}", file=sys.stderr)
        return EXIT_FAILURE
