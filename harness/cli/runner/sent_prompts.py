"""Prompts that a server has had before: a prefix cache may know them, and then answers come too soon.

What was sent where is kept in ``$XDG_STATE_HOME/harness/seen.json`` (0600), whatever ``--out`` was: of each run a hash
of the server's address, one of what its prompts are made from, and when. Runs of other users or machines are seen
where they share the folder of runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from harness.paths import state_dir
from harness.plan.file import PlanInfo
from harness.record.manifest import MANIFEST, PRIVATE, RunDir, RunManifest
from harness.untrusted import read_regular

LOOKED_AT = 200
"""Runs in the folder, the newest: there may be many."""
KEPT = 1000
"""Entries of the file, the newest; ten thousand runs later a cache knows nothing of a prompt."""
_MOST_BYTES = 2**20
PRIVATE_FILE = 0o600
LOCK_S = 2.0


class _Source(msgspec.Struct):
    """What the prompts of a plan are made from."""

    trace_sha256: str
    seed: int
    tokenizer: str | None = None
    """Null: nothing is made up, and no seed changes texts of the trace."""

    @property
    def hash(self) -> str:
        seed = "" if self.tokenizer is None else f" {self.seed}"
        return sha256(f"{self.trace_sha256}{seed}".encode()).hexdigest()


class _Spec(msgspec.Struct):
    base_urls: list[str]


class _Manifest(msgspec.Struct):
    """What of a manifest is asked for."""

    plan: _Source
    spec: _Spec
    start_unix_ns: int | None = None


class Seen(msgspec.Struct, frozen=True):
    """Prompts of one source that one server was sent."""

    address: str
    """Hash of scheme, host and port: no path, query or user, which may be secret."""
    prompts: str
    at: int
    """Unix time, s."""


def seen_before(run: RunDir, manifest: RunManifest) -> str | None:
    """What to say of an earlier run that sent prompts of the same source to one of this run's servers.

    Only of servers that were there already: those started for a run begin with an empty cache.
    """
    if manifest.engine != "url":
        return None
    earlier = _in_folder(run, manifest) or _in_state(manifest)
    if earlier is None:
        return None
    if manifest.plan.tokenizer is None:
        what, other = "texts of the same trace", "restart it, or reset its cache: no --seed changes them"
    else:
        what = "prompts of the same trace and seed"
        other = f"--seed {manifest.plan.seed + 1} makes up others (texts of the trace itself stay the same)"
    return f"this server has had {what} before ({earlier}): a prefix cache may know them; {other}"


def note_sent(manifest: RunManifest, now_s: float | None = None) -> None:
    """Keep that this run's prompts are being sent to its servers. Where that cannot be written, nobody is told."""
    if manifest.engine != "url":
        return
    at = int(time.time() if now_s is None else now_s)
    prompts, addresses = _prompts(manifest.plan), _addresses(manifest.spec.base_urls)
    file = _file()
    with contextlib.suppress(OSError), _alone(file):
        others = [one for one in _read(file) if one.prompts != prompts or one.address not in addresses]
        mine = [Seen(address, prompts, at) for address in addresses]
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.touch(mode=PRIVATE_FILE)
        temporary.write_bytes(msgspec.json.encode([*others, *mine][-KEPT:]))
        temporary.replace(file)


def _in_state(manifest: RunManifest) -> str | None:
    """When a server of this run was sent such prompts."""
    prompts, addresses = _prompts(manifest.plan), _addresses(manifest.spec.base_urls)
    at = max((one.at for one in _read(_file()) if one.prompts == prompts and one.address in addresses), default=None)
    return None if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def _in_folder(run: RunDir, manifest: RunManifest) -> str | None:
    """The name of a run beside this one that did."""
    prompts, addresses = _prompts(manifest.plan), set(_addresses(manifest.spec.base_urls))
    for path in _newest(run.path.parent.iterdir()):
        if path == run.path or not (path / MANIFEST).is_file():
            continue
        try:
            other = msgspec.json.decode((path / MANIFEST).read_bytes(), type=_Manifest)
        except (OSError, msgspec.DecodeError):
            continue
        same = other.plan.hash == prompts and other.start_unix_ns is not None
        if same and addresses.intersection(_addresses(other.spec.base_urls)):
            return path.name
    return None


def _newest(paths: Iterable[Path]) -> list[Path]:
    """Run directories are named by the time of their beginning."""
    return sorted((path for path in paths if path.is_dir()), reverse=True)[:LOOKED_AT]


def _prompts(plan: PlanInfo) -> str:
    return _Source(plan.trace_sha256, plan.seed, plan.tokenizer).hash


def _addresses(base_urls: Iterable[str]) -> list[str]:
    parts = [urlsplit(url) for url in base_urls]
    return [sha256(f"{part.scheme}://{part.netloc.rpartition('@')[2]}".lower().encode()).hexdigest() for part in parts]


def _file() -> Path:
    return state_dir() / "seen.json"


def _read(file: Path) -> list[Seen]:
    """What was kept; what cannot be read is forgotten."""
    try:
        return msgspec.json.decode(read_regular(file, _MOST_BYTES), type=list[Seen])
    except (OSError, ValueError, msgspec.DecodeError):
        return []


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Runs may begin together. Raises `OSError` when another holds the file for longer than any write takes."""
    file.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    lock = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    deadline = time.monotonic() + LOCK_S
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)
