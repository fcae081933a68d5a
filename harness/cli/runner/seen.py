"""Which prompts a server was sent before: a prefix cache may know them, and then answers come too soon."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from urllib.parse import urlsplit

import msgspec

from harness import state_dir
from harness.record.manifest import PRIVATE, RunManifest
from harness.untrusted import DECODE_ERRORS, read_regular

SEEN = "seen.jsonl"


class SentPrompts(msgspec.Struct, frozen=True):
    """Prompts of one source that one server was sent: a line of ``$XDG_STATE_HOME/harness/seen.jsonl`` (0600)."""

    address: str
    """Hash of scheme, host and port: no path, query or user, which may be secret."""
    prompts: str
    """Hash of what they are made from: the trace, and where prompts are made up the seed."""
    at: int
    """Unix time, s."""


MOST_BYTES = 2**20
"""Of that file; then it begins anew: thousands of runs later a cache knows nothing of a prompt."""


def seen_before(manifest: RunManifest) -> str | None:
    """What to say of an earlier run that sent prompts of the same source to one of this run's servers: a prefix cache
    may know them, and then answers come too soon.

    Only of servers that were there already: those started for a run begin with an empty cache.
    """
    ours = {(one.address, one.prompts) for one in _sent(manifest, 0)}
    at = max((one.at for one in _read_seen() if (one.address, one.prompts) in ours), default=None)
    if at is None:
        return None
    if manifest.plan.tokenizer is None:
        what, other = "texts of the same trace", "restart it, or reset its cache: no --seed changes them"
    else:
        what = "prompts of the same trace and seed"
        other = f"--seed {manifest.plan.seed + 1} makes up others (texts of the trace itself stay the same)"
    earlier = f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
    return f"this server has had {what} before ({earlier}): a prefix cache may know them; {other}"


def warn_of_sent(manifest: RunManifest, tell: Callable[[str], None]) -> None:
    """Say it, where there is something to say."""
    if said := seen_before(manifest):
        tell(said)


def note_sent(manifest: RunManifest, now_s: float | None = None) -> None:
    """Keep that this run's prompts are being sent to its servers. Where that cannot be written, nobody is told."""
    lines = b"".join(
        msgspec.json.encode(one) + b"\n" for one in _sent(manifest, time.time() if now_s is None else now_s)
    )
    file = state_dir() / SEEN
    with suppress(OSError):
        file.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            file.unlink()
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        try:
            os.write(handle, lines)  # one write: runs that begin together do not mix their lines
        finally:
            os.close(handle)


def _sent(manifest: RunManifest, now_s: float) -> list[SentPrompts]:
    plan, urls = manifest.plan, manifest.spec.base_urls if manifest.engine == "url" else []
    seed = "" if plan.tokenizer is None else f" {plan.seed}"
    prompts = sha256(f"{plan.trace_sha256}{seed}".encode()).hexdigest()
    servers = {f"{part.scheme}://{part.netloc.rpartition('@')[2]}".lower() for part in map(urlsplit, urls)}
    return [SentPrompts(sha256(server.encode()).hexdigest(), prompts, int(now_s)) for server in sorted(servers)]


def _read_seen() -> Iterator[SentPrompts]:
    """What was kept; what cannot be read is forgotten."""
    with suppress(OSError):
        for line in read_regular(state_dir() / SEEN, 2 * MOST_BYTES).splitlines():
            with suppress(*DECODE_ERRORS):
                yield msgspec.json.decode(line, type=SentPrompts)
