"""What a run needs of S3: where to put it, and how to get it back.

`mirrored` sends a run directory while it grows, `output_file` a file when it is done; `local_copy` brings back a file
or a run, also one whose machine died in between. ``python -m harness.store RUN_DIRECTORY s3://BUCKET/PREFIX`` sends a
run, or what is missing of it, later. Single objects: `harness.s3`. How a run lies there: `harness.mirror`.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import EXIT_FAILURE, EXIT_USAGE, EXIT_VALID, HarnessError
from harness.mirror import LAST, PARTS, REPLACED, SENDER, Mirror, Say, silent
from harness.paths import cache_dir
from harness.s3 import (
    Stored,
    as_url,
    connect,
    download,
    exists,
    fetch,
    is_url,
    list_objects,
    upload,
)
from harness.s3_errors import StoreError, disk_error

__all__ = [
    "Mirror", "StoreError", "as_url", "download", "exists", "is_url", "list_objects", "local_copy", "mirrored",
    "output_file", "restore", "send", "split_out", "upload",
]  # fmt: skip

LOCAL_RUNS = Path("runs")
_AT_ONCE = 8


# --- sending -------------------------------------------------------------------------------------------------------


@contextmanager
def mirrored(url: str | None, run_dir: Path, say: Say = silent) -> Iterator[None]:
    """Send the run directory to ``<url>/<its name>`` while the block runs, and whole at its end; null: do nothing.

    Enter when the plan is in the directory and before anything is started: credentials, bucket or name that cannot work
    raise `StoreError` here. From then on trouble with the store is said, and raises nothing.
    """
    if url is None:
        yield
        return
    mirror = Mirror(run_dir, f"{as_url(url)}/{run_dir.name}", say)
    mirror.start()
    try:
        yield
    finally:
        mirror.close()


def split_out(out: str | Path) -> tuple[Path, str | None]:
    """(folder for run directories on this machine, URL they go to or null) of what ``--out`` says."""
    return (LOCAL_RUNS, as_url(out)) if is_url(out) else (Path(out), None)


def send(run_dir: Path, url: str, say: Say = silent) -> bool:
    """Send a run directory, or what is missing of it, to ``<url>/<its name>``; whether all is there."""
    if not (run_dir / LAST).is_file():
        raise StoreError(as_url(url), f"{run_dir} is not a run directory: it has no {LAST}")
    return Mirror(run_dir, f"{as_url(url)}/{run_dir.resolve().name}", say).close()


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m harness.store RUN_DIRECTORY s3://BUCKET/PREFIX``: exit status 0 when all of it is there."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 2 or not is_url(arguments[1]):
        print("usage: python -m harness.store RUN_DIRECTORY s3://BUCKET/PREFIX", file=sys.stderr)
        return EXIT_USAGE
    try:
        sent = send(Path(arguments[0]), arguments[1], lambda words: print(words, file=sys.stderr))
    except HarnessError as e:
        print(f"harness: {e}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_VALID if sent else EXIT_FAILURE


# --- bringing back -------------------------------------------------------------------------------------------------


def restore(url: str, folder: Path, *, client: Any = None) -> list[str]:
    """Make the run directory ``folder`` from what the store has of it; returns what a reader has to know, if anything.

    Whole files come as they are. Of a run whose machine died in between, files are put together from their parts, up
    to the first that is missing. Raises `StoreError` when there is nothing, or ``folder`` exists.
    """
    client = client or connect()
    whole, parts, notes = _contents(list_objects(url, client=client))
    if not whole and not parts:
        raise StoreError(as_url(url), "there is no run here; 'aws s3 ls' shows what there is")
    if folder.exists():
        raise StoreError(url, f"{folder} exists already; nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, stored in whole.items():
            download(stored.url, partial / name, client=client)
        for name in sorted(parts.keys() - whole.keys()):
            notes += _put_together(client, parts[name], partial / name)
        partial.rename(folder)
    except OSError as e:
        raise disk_error(url, e) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def _contents(found: list[Stored]) -> tuple[dict[str, Stored], dict[str, list[Stored]], list[str]]:
    """Whole files, parts by file in their order, and a note on the sender. Other names are not ours to write."""
    whole: dict[str, Stored] = {}
    parts: dict[str, list[Stored]] = {}
    for stored in found:
        if match := re.fullmatch(rf"{re.escape(PARTS)}/(\w[\w.-]*)/\d{{16}}", stored.name, re.ASCII):
            parts.setdefault(match[1], []).append(stored)
        elif re.fullmatch(r"\w[\w.-]*", stored.name, re.ASCII):
            whole[stored.name] = stored
    unfinished = any(stored.name == SENDER for stored in found)
    return whole, parts, ["this run is still being sent, or its machine died before the end"] if unfinished else []


def _put_together(client: Any, parts: list[Stored], path: Path) -> list[str]:
    """Parts -> file; a note when some are missing."""
    if path.suffix in REPLACED:  # the newest version counts
        download(parts[-1].url, path, client=client)
        return []
    at, usable = 0, 0
    for part in parts:
        if int(part.name.rpartition("/")[2]) != at:
            break
        at += part.size
        usable += 1
    with path.open("xb") as file, ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, usable, _AT_ONCE):
            batch = parts[start : min(usable, start + _AT_ONCE)]
            for data in pool.map(lambda part: _bytes(client, part), batch):
                file.write(data)
    lost = f"{path.name}: a part after byte {at:,} is missing; what came before it is used"
    return [lost] if usable < len(parts) else []


def _bytes(client: Any, part: Stored) -> bytes:
    out = io.BytesIO()
    fetch(part.url, out, client=client)
    return out.getvalue()


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
        from harness import sweep_store

        if any(stored.url == url for stored in found):
            download(url, kept, client=client)
        elif sweep_store.is_sweep(found):
            sweep_store.pull(url, kept, say, found=found)
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


if __name__ == "__main__":
    sys.exit(main())
