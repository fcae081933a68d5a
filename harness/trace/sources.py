"""The files of one trace: one, several, a folder, a pattern, a zip archive, or all objects below a prefix on S3."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from harness.errors import TraceError, UsageError
from harness.terminal import printable
from harness.trace.source import TraceFile, magic, open_source

_ZIP = b"PK\x03\x04"
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a trace, in the order of their names."""

    name: str
    """For messages, as the user gave it."""
    files: tuple[TraceFile, ...]
    found: frozenset[int] = frozenset()
    """Those that nobody named: of a folder, an archive or a prefix."""
    sha256: str = field(init=False)
    """Of the file as it lies there; of several, of their digests."""

    def __post_init__(self) -> None:
        digests = list(dict.fromkeys((str(file.path), file.sha256) for file in self.files))
        whole = (
            digests[0][1] if len(digests) == 1 else hashlib.sha256("".join(d for _, d in digests).encode()).hexdigest()
        )
        object.__setattr__(self, "sha256", whole)

    def without(self, gone: set[int]) -> Sources:
        """All but these."""
        kept = [at for at in range(len(self.files)) if at not in gone]
        return Sources(
            self.name,
            tuple(self.files[at] for at in kept),
            frozenset(i for i, at in enumerate(kept) if at in self.found),
        )


def open_sources(names: Sequence[str | Path]) -> Sources:
    """The files that ``names`` stand for: paths, ``-``, patterns (``logs/*.jsonl.gz``), folders with all below them,
    archives with their members, ``s3://bucket/key``, prefixes of those (``s3://bucket/logs/``) and patterns.

    Raises `TraceError` when one cannot be read or stands for no file, `UsageError` without a name.
    """
    if not names:
        raise UsageError("name a trace")
    files: list[TraceFile] = []
    found: set[int] = set()
    for name in map(str, names):
        for source, named in _expanded(name):
            found |= set() if named else {len(files)}
            files.append(source)
    first = str(names[0])
    said = files[0].name if len(files) == 1 else first if len(names) == 1 else f"{first} and {len(names) - 1} more"
    return Sources(printable(said), tuple(files), frozenset(found))


def _expanded(name: str) -> Iterator[tuple[TraceFile, bool]]:
    """(file, whether it was named itself) of each file that a name stands for."""
    url = re.sub(r"^s3:/+", "s3://", name)
    if url.startswith("s3://"):
        yield from _objects(url)
        return
    path = Path(name)
    if name != "-" and not os.path.lexists(path) and _PATTERN.search(name):
        matches = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())  # noqa: PTH207
        if not matches:
            raise TraceError(name, None, "no file matches this pattern")
        for match in matches:
            yield from ((source, True) for source in _members(open_source(match)))
    elif name != "-" and path.is_dir():
        files = sorted(_below(path))
        if not files:
            raise TraceError(name, None, "is a directory without a file")
        for file in files:
            yield from ((source, False) for source in _members(open_source(file)))
    else:
        members = _members(open_source(name))
        yield from ((source, len(members) == 1) for source in members)


def _below(folder: Path) -> Iterator[Path]:
    """Files of a folder and of those in it, without hidden ones and those that only mark that a job has ended."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (path for name in files if not name.startswith((".", "_")) and (path := Path(root, name)).is_file())


def _members(source: TraceFile) -> list[TraceFile]:
    """The files of a zip archive; any other file is its own."""
    if not magic(source, 4).startswith(_ZIP):
        return [source]
    try:
        with zipfile.ZipFile(source.path) as archive:
            names = sorted(
                info.filename for info in archive.infolist() if not info.is_dir() and _is_shown(info.filename)
            )
    except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
        raise TraceError(source.name, None, f"damaged zip archive ({e}): copy it again") from e
    if not names:
        raise TraceError(source.name, None, "a zip archive without a file")
    if len(names) == 1:
        return [replace(source, member=names[0])]
    return [replace(source, name=printable(f"{source.name}/{name}"), member=name) for name in names]


def _is_shown(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _objects(url: str) -> Iterator[tuple[TraceFile, bool]]:
    from harness.store.objects import StoreError, connect, fetch, list_objects

    pattern = _PATTERN.search(url)
    alone: TraceError | None = None
    if pattern is None and not url.endswith("/"):
        try:
            members = _members(open_source(url))
            yield from ((source, len(members) == 1) for source in members)
            return
        except TraceError as e:
            if not isinstance(e.__cause__, StoreError):
                raise
            alone = e
    folder = url if pattern is None else url[: pattern.start()].rpartition("/")[0]
    try:
        client = connect()
        objects = list_objects(folder.rstrip("/"), client=client)
        wanted = [o for o in objects if o.size and (_is_shown(o.name) if pattern is None else fnmatchcase(o.url, url))]
        if not wanted:
            raise alone or TraceError(url, None, "no object below this name")
        # In one folder: an open file for each would be too many.
        spool = tempfile.TemporaryDirectory(prefix="harness-trace-")
        for at, stored in enumerate(wanted):
            path = Path(spool.name) / str(at)
            with path.open("wb") as file:
                source = TraceFile(printable(stored.url), path, fetch(stored.url, file, client=client), spool)
            yield from ((member, False) for member in _members(source))
    except StoreError as e:
        raise alone or TraceError(url, None, f"cannot read from S3: {e.problem}") from e
