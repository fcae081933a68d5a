"""A sweep on S3: its folder is local, the store follows it, and any machine can go on from there.

Below ``<--out>/<name of the sweep's folder>``:

===============================  ======================================================================================
.state/<16 digits>               ``sweep.json`` after each step, by its revision; the last one counts. Nothing is ever
                                 overwritten, so of two harnesses at work on one sweep the second is refused
plans/<plan>                     every plan
answers/<16 digits>.json         what a search for capacity found (``capacity.json``), by the revision it was made from
<point>/                         a point's run, as `harness.mirror` keeps one: its rows go up while it runs
<point>.aborted-<n>/             what was left of a point that was then done again
servers/<pair>-<n>/              logs of the servers
===============================  ======================================================================================
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import UsageError
from harness.mirror import LAST, Mirror, Say
from harness.s3 import Stored, as_url, connect, download, fetch, list_objects, move, put, upload
from harness.s3_errors import StoreError, disk_error
from harness.store import restore, send
from harness.sweep_state import STATE, SweepState, read_state

STATES, ANSWERS = ".state", "answers"
ANSWER = "capacity.json"
"""What a search found, in its folder."""
RUN = re.compile(r"(?!\.)[\w.-]+", re.ASCII)
"""Name of a folder below the sweep's that is ours to write."""


class SweepStore:
    """Keeps the store up with a sweep's folder; without a URL it does nothing.

    Trouble with the store is said and stops nothing: `close` sends what is missing. Only `begin` raises, and `state`
    when another harness goes on with this very sweep.
    """

    def __init__(self, folder: Path, url: str | None, say: Say) -> None:
        self.url = url
        self._folder, self._say = folder, say
        self._client: Any = connect() if url else None
        self._unsent: set[int] = set()
        """Revisions of the state that are not up."""
        self._servers = 0
        self._told: str | None = None

    def begin(self, state: SweepState) -> None:
        """Write the first state. Raises `StoreError` when that cannot work or the name is taken."""
        if self.url:
            put(_encoded(state), self._state_url(state), client=self._client)
            self._say(f"sending to {self.url}")

    def state(self, state: SweepState) -> None:
        """Send this revision of the state. Raises `UsageError` when the store has another of that number."""
        if not self.url:
            return
        try:
            put(_encoded(state), self._state_url(state), client=self._client)
        except StoreError as e:
            if "exists already" in e.problem:
                raise UsageError(f"{self.url}: another harness is at work on this sweep") from e
            self._unsent.add(state.revision)
            self._tell(e)

    def _state_url(self, state: SweepState) -> str:
        return f"{self.url}/{STATES}/{state.revision:016d}"

    def plan(self, path: Path) -> None:
        """Send a plan; the same one there already is as good."""
        if self.url:
            try:
                upload(path, f"{self.url}/plans/{path.name}", client=self._client)
            except StoreError as e:
                self._tell(e)

    def answer(self, path: Path, revision: int) -> None:
        """Send what a search found."""
        if self.url:
            try:
                upload(path, f"{self.url}/{ANSWERS}/{revision:016d}.json", client=self._client)
            except StoreError as e:
                self._tell(e)

    @contextmanager
    def following(self, folder: Path, name: str) -> Iterator[None]:
        """Send this folder as ``name`` while the block runs, and whole at its end."""
        mirror = None
        if self.url:
            try:
                mirror = Mirror(folder, f"{self.url}/{name}", self._quiet)
                mirror.start()
            except StoreError as e:
                mirror = None
                self._tell(e)
        try:
            yield
        finally:
            if mirror is not None and not mirror.close(0.0):  # servers are paid for: `close` is patient
                self._say(f"store: {name}: not all of it is there yet")

    def servers(self, folder: Path) -> Any:
        """Send the logs of servers while they are up."""
        while self.url and self._list(f"{self.url}/servers/{folder.name}-{self._servers}"):
            self._servers += 1
        name = f"servers/{folder.name}-{self._servers}"
        self._servers += 1
        return self.following(folder, name)

    def _list(self, url: str) -> list[Stored]:
        try:
            return list_objects(url, client=self._client)
        except StoreError as e:
            self._tell(e)
            return []

    def set_aside(self, point: str, aside: str) -> None:
        """What is there of a point goes under another name, as in the folder."""
        if self.url:
            try:
                if found := list_objects(f"{self.url}/{point}", client=self._client):
                    move(found, f"{self.url}/{aside}", client=self._client)
            except StoreError as e:
                self._tell(e)

    def close(self, state: SweepState) -> bool:
        """Send what is missing of it; whether all of it is there. Ctrl-C gives up sending."""
        if not self.url:
            return True
        problem: str | None = None
        try:
            whole = {stored.name for stored in list_objects(self.url, client=self._client)}
            for plan in sorted((self._folder / "plans").glob("*.arrow")):
                if f"plans/{plan.name}" not in whole:
                    upload(plan, f"{self.url}/plans/{plan.name}", client=self._client)
            for run in sorted(path.parent for path in self._folder.glob(f"*/{LAST}")):
                if f"{run.name}/{LAST}" not in whole and not send(run, self.url, self._quiet):
                    problem = f"{run.name} could not be sent"
            if self._unsent:
                put(_encoded(state), self._state_url(state), client=self._client)
        except StoreError as e:
            problem = "another harness is at work on this sweep" if "exists already" in e.problem else str(e)
        except KeyboardInterrupt:
            problem = "sending was stopped by the user"
        if problem:
            self._say(f"store: not all of the sweep is at {self.url}: {problem}. All of it is in {self._folder}; "
                      "harness sweep --resume sends what is missing")  # fmt: skip
        else:
            self._say(f"all of the sweep is at {self.url}")
        return problem is None

    def _quiet(self, words: str) -> None:
        """Of a run's mirror only trouble is worth a line."""
        if words.startswith("store: ") and "not all of the run" not in words:
            self._tell(StoreError(self.url or "", words.removeprefix("store: ")))

    def _tell(self, e: StoreError) -> None:
        """Say each new trouble once."""
        if e.problem != self._told:
            self._told = e.problem
            self._say(f"store: {e.problem}; the sweep goes on, and what is missing is sent at its end")


def _encoded(state: SweepState) -> bytes:
    return msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n"


def is_sweep(found: list[Stored]) -> bool:
    """Whether these are the objects of a sweep."""
    return any(re.fullmatch(rf"{re.escape(STATES)}/\d{{16}}", stored.name, re.ASCII) for stored in found)


def pull(url: str | Path, folder: Path, say: Say, *, found: list[Stored] | None = None) -> None:
    """Make the folder of a sweep from what the store has of it; of runs that were cut, what had gone up.

    Raises `StoreError` when there is none, or ``folder`` exists.
    """
    url, client = as_url(url), connect()
    found = list_objects(url, client=client) if found is None else found
    if not is_sweep(found):
        raise StoreError(url, "there is no sweep here; 'aws s3 ls' shows what there is")
    if folder.exists():
        raise StoreError(url, f"{folder} exists already; nothing is overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _pull_all(url, partial, found, say, client)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        raise disk_error(url, e) from e


def _pull_all(url: str, folder: Path, found: list[Stored], say: Say, client: Any) -> None:
    states = [stored for stored in found if re.fullmatch(rf"{re.escape(STATES)}/\d{{16}}", stored.name, re.ASCII)]
    with (folder / STATE).open("xb") as file:
        fetch(states[-1].url, file, client=client)
    for stored in found:
        kind, _, name = stored.name.partition("/")
        if kind == "plans" and RUN.fullmatch(name):
            download(stored.url, folder / kind / name, client=client)
    answers = [stored for stored in found if re.fullmatch(rf"{ANSWERS}/\d{{16}}\.json", stored.name, re.ASCII)]
    if answers:
        download(max(answers, key=lambda stored: stored.name).url, folder / ANSWER, client=client)
    runs = {stored.name.partition("/")[0] for stored in found if "/" in stored.name}
    for run in sorted(runs - {STATES, ANSWERS, "plans", "servers"}):
        if RUN.fullmatch(run):
            for note in restore(f"{url}/{run}", folder / run, client=client):
                say(f"{run}: {note}")
    # The last sign of life tells until when the servers of a crashed sweep are paid.
    last_s = max(stored.changed_s for stored in found)
    for path in folder.rglob("*"):
        os.utime(path, (last_s, last_s))


def come_home(url: str | Path, root: Path, say: Say) -> Path:
    """The local folder to go on with the sweep at ``url``: the one that is under ``root``, else a copy of the store's.

    Raises `UsageError` when the store knows of later steps than the folder that is here.
    """
    url = as_url(url)
    folder = root / url.rpartition("/")[2]
    found = list_objects(url)
    if not folder.exists():
        pull(url, folder, say, found=found)
        say(f"{url}: copied to {folder}")
        return folder
    states = [int(stored.name.rpartition("/")[2]) for stored in found if stored.name.startswith(f"{STATES}/")]
    if states and max(states) > read_state(folder).revision:
        raise UsageError(f"{folder}: {url} has later steps of this sweep: move the folder away, then its copy is made")
    return folder
