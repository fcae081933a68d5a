"""A sweep on S3: its folder is local, the store follows it file by file, and any machine can go on from there.

Its ``sweep.json`` is replaced there by compare-and-swap after every step: of two harnesses at work on one sweep the
second finds another state than the one it would replace, and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from harness.errors import UsageError
from harness.store.copies import restore
from harness.store.errors import StoreError
from harness.store.follow import CLOSE_S, Follower, Say
from harness.store.objects import as_url, connect, get, put, upload
from harness.sweep.state import STATE, SweepState, read_state

ANSWER = "capacity.json"
"""What a search found, in its folder."""


class SweepStore:
    """Keeps the store up with a sweep's folder; without a URL it does nothing.

    Trouble with the store is said and stops nothing: `close` sends what is missing. Only `begin` raises, and `state`
    when another harness goes on with this very sweep.
    """

    def __init__(self, folder: Path, url: str | None, say: Say) -> None:
        self.url = url
        self._folder, self._say = folder, say
        self._client: Any = connect() if url else None
        self._follower = Follower(folder, url, self._tell, apart={STATE}) if url else None
        self._etag: str | None = None
        """Of the state that is there; null when there is none, or it is not known."""
        self._unsent = False
        self._told: str | None = None

    def begin(self, state: SweepState) -> None:
        """Own the sweep and begin to follow. Raises `StoreError` when that cannot work or the name is taken."""
        if self._follower is None:
            return
        if state.revision:
            self.state(state)
        else:
            self._etag = put(_encoded(state), f"{self.url}/{STATE}", client=self._client)
            self._say(f"sending to {self.url}")
        self._follower.start()

    def state(self, state: SweepState) -> None:
        """Replace the state that is there. Raises `UsageError` when it is another harness's."""
        if self._follower is None:
            return
        try:
            self._replace(state)
            self._unsent = False
        except StoreError as e:
            self._unsent = True
            self._tell(e.problem)
        self._follower.flush()

    def _replace(self, state: SweepState) -> None:
        """Raises `StoreError`, and `UsageError` for a step of another harness."""
        there = f"{self.url}/{STATE}"
        try:
            if self._etag is not None:
                self._etag = put(_encoded(state), there, client=self._client, replaces=self._etag)
                return
        except StoreError as e:
            if not e.conflict:
                raise
        # The first step of this sitting, or one of our own arrived although its answer did not.
        found = get(there, client=self._client)
        if found is not None:
            known = msgspec.json.decode(found[0], type=SweepState)
            if known.writer != state.writer and (self._etag is not None or known.revision > state.revision):
                raise UsageError(f"{self.url}: another harness is at work on this sweep")
        self._etag = put(_encoded(state), there, client=self._client, replaces=found[1] if found else None)

    def set_aside(self, point: str) -> None:
        """What is there of a point goes: the folder has it under another name, under which it is sent."""
        if self._follower is not None:
            try:
                self._follower.remove(point)
            except StoreError as e:
                self._tell(e.problem)

    def send(self, path: Path) -> None:
        """Send this file of the folder, which was written after the end."""
        if self.url:
            try:
                upload(path, f"{self.url}/{path.name}", client=self._client, overwrite=True)
            except StoreError as e:
                self._tell(e.problem)

    def close(self, state: SweepState) -> bool:
        """Send what is missing; whether all of it is there. Ctrl-C gives up sending."""
        if self._follower is None:
            return True
        try:
            problem = self._follower.close(CLOSE_S)
            if self._unsent:
                self._replace(state)
        except (StoreError, UsageError) as e:
            problem = str(e)
        except KeyboardInterrupt:
            problem = "sending was stopped by the user"
        if problem:
            self._say(f"store: not all of the sweep is at {self.url}: {problem}. All of it is in {self._folder}; "
                      "harness sweep --resume sends what is missing")  # fmt: skip
        else:
            self._say(f"all of the sweep is at {self.url}")
        return problem is None

    def _tell(self, problem: str) -> None:
        """Say each new trouble once."""
        if problem != self._told:
            self._told = problem
            self._say(f"store: {problem.removeprefix('store: ')}")


def _encoded(state: SweepState) -> bytes:
    return msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n"


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
