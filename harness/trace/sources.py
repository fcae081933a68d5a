"""The files of one trace: one, several, a folder, a pattern, a zip archive, or all objects below a prefix on S3; and
which of their rows are wanted.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, cast, get_args

from harness.errors import TraceError, UsageError, unknown_name
from harness.terminal import printable
from harness.trace.formats.record import TraceRecord
from harness.trace.hub import dataset_files, is_dataset
from harness.trace.source import TraceFile, full_name, magic, open_source

_ZIP = b"PK\x03\x04"
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a trace, in the order of their names."""

    name: str
    files: tuple[TraceFile, ...]

    @property
    def sha256(self) -> str:
        digests = list(dict.fromkeys((str(file.path), file.sha256) for file in self.files))
        if len(digests) == 1:
            return digests[0][1]
        return hashlib.sha256("".join(digest for _, digest in digests).encode()).hexdigest()


def open_sources(names: Sequence[str | Path]) -> Sources:
    """The files that ``names`` stand for: paths, ``-``, patterns (``logs/*.jsonl.gz``), folders with all below them,
    archives with their members, ``s3://bucket/key``, prefixes of those (``s3://bucket/logs/``) and patterns, and
    datasets (`harness.trace.hub`).

    Raises `TraceError` when one cannot be read or stands for no file, `UsageError` without a name.
    """
    if not names:
        raise UsageError("name a trace")
    files = [file for name in map(str, names) for file in _expanded(name)]
    first = str(names[0])
    said = files[0].name if len(files) == 1 else first if len(names) == 1 else f"{first} and {len(names) - 1} more"
    return Sources(printable(said), tuple(files))


def _expanded(name: str) -> list[TraceFile]:
    url = full_name(name)
    if url.startswith("s3://"):
        return _objects(url)
    if is_dataset(url):
        return dataset_files(url)
    path = Path(name)
    if name != "-" and not os.path.lexists(path) and _PATTERN.search(name):
        matches = sorted(match for match in glob.glob(name, recursive=True) if Path(match).is_file())  # noqa: PTH207
        if not matches:
            raise TraceError(name, None, "no file matches this pattern")
        return [replace(member, named=True) for match in matches for member in _members(open_source(match))]
    if name == "-" or not path.is_dir():
        return _members(open_source(name))
    files = sorted(
        Path(root, file)
        for root, folders, found in os.walk(path)
        for file in found
        # Without hidden ones and those that only mark that a job has ended.
        if not any(part.startswith((".", "_")) for part in (*Path(root).relative_to(path).parts, file))
        and Path(root, file).is_file()
    )
    if not files:
        raise TraceError(name, None, "is a directory without a file")
    return [replace(member, named=False) for file in files for member in _members(open_source(file))]


def _members(source: TraceFile) -> list[TraceFile]:
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
    return [replace(source, name=printable(f"{source.name}/{name}"), member=name, named=False) for name in names]


def _is_shown(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _objects(url: str) -> list[TraceFile]:
    from harness.store.objects import StoreError, connect, fetch, list_objects

    pattern = _PATTERN.search(url)
    alone: TraceError | None = None
    if pattern is None and not url.endswith("/"):
        try:
            return _members(open_source(url))
        except TraceError as e:
            if not isinstance(e.__cause__, StoreError):
                raise
            alone = e
    folder = url if pattern is None else url[: pattern.start()].rpartition("/")[0]
    files: list[TraceFile] = []
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
                sha256 = fetch(stored.url, file, client=client)
            files += _members(TraceFile(printable(stored.url), path, sha256, spool, named=False))
    except StoreError as e:
        raise alone or TraceError(url, None, f"cannot read from S3: {e.problem}") from e
    return files


Field = Literal["model", "session", "adapter"]


@dataclass(frozen=True, slots=True)
class Where:
    """Rows whose field matches one of the patterns (``*``, ``?`` and ``[...]`` as in names of files; case counts)."""

    field: Field
    patterns: tuple[str, ...]

    def unmatched(self, row: TraceRecord) -> str | None:
        """Why a row is left out (one that does not say the field is); None: it is wanted."""
        value = {"model": row.model, "session": row.session_id, "adapter": row.adapter}[self.field]
        wanted = value is not None and any(fnmatchcase(value, pattern) for pattern in self.patterns)
        return None if wanted else f"not {self.field}={'|'.join(self.patterns)} (--where)"


def parse_where(texts: Iterable[str]) -> tuple[Where, ...]:
    """``FIELD=PATTERN`` or ``FIELD=PATTERN|PATTERN``; a row must match each. Raises `UsageError`."""
    found = []
    for text in texts:
        name, equals, patterns = text.partition("=")
        some = tuple(pattern.strip() for pattern in patterns.split("|"))
        if not equals or not all(some):
            raise UsageError(f"--where {text!r}: expected FIELD=PATTERN, like model=llama-3*")
        if name.strip() not in get_args(Field):
            raise unknown_name("field", name.strip(), get_args(Field))
        found.append(Where(cast(Field, name.strip()), some))
    return tuple(found)
