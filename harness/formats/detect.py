"""Which format a file has, from its first record; and what it is instead, when it has none."""

from __future__ import annotations

import re

import msgspec

from harness.errors import TraceError
from harness.formats import FORMATS
from harness.source import Source, records

_HEAD_RECORDS = 200
"""A log is recognised by one of this many first lines: servers print a banner before the first request."""


def detect(source: Source) -> str:
    """Name of the format that the first record shows.

    Raises `TraceError` when none or several do, with what the file looks like.
    """
    first, line = b"", None
    for at, (number, record) in enumerate(records(source)):
        found = [name for name, reader in FORMATS.items() if (reader.log or not at) and reader.sniff(record)]
        if len(found) == 1:
            return found[0]
        if not first:
            first, line = record, number
        if found or at + 1 == _HEAD_RECORDS:
            break
    else:
        found = []
    if not first:
        raise TraceError(source.name, None, "is empty: no line with anything on it")
    seen = first[:100].decode("utf-8", "replace").rstrip("\r\n")
    problem = f"could be {' or '.join(found)}" if found else f"format not recognised{_looks_like(first)}"
    formats = "".join(f"\n  {name:9} {reader.summary}" for name, reader in FORMATS.items())
    raise TraceError(source.name, line, f"{problem}. First line: {seen!r}. --trace-format NAME forces one of:{formats}")


_MAGIC = {
    b"\xfd7zXZ": "xz: decompress it first (xz -d)",
    b"BZh": "bzip2: decompress it first (bunzip2)",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8 first (iconv)",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8 first (iconv)",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"<": "HTML or XML, perhaps an error page saved as a file",
}


_SERVEGEN = re.compile(
    rb'\d+,[\d.]+,[\d.]+,(Gamma|Weibull)?,[\d.e-]+,[\d.e-]+\s*$|\{\s*"\d+": \{\s+"\w+_(tokens|ratio)"'
)


def _looks_like(first: bytes) -> str:
    if _SERVEGEN.match(first):
        return "; it looks like a ServeGen client model, not requests: 'harness trace synth --servegen' draws a trace"
    line = first.partition(b"\r")[0]
    for name, reader in FORMATS.items():
        if reader.sniff(line) and not first.startswith(b"{"):
            return f"; it looks like {name} with lines that end in a carriage return: convert it (tr '\\r' '\\n')"
        for mark in b";", b"\t", b"|":
            if mark in line and reader.sniff(line.replace(mark, b",")):
                return f"; it looks like {name} with {mark.decode()!r} between its fields: write it with commas"
    if first.startswith(b"{"):
        try:
            msgspec.json.decode(first)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            return f"; it is no JSON object on one line ({e})"
    return next((f"; it looks like {what}" for magic, what in _MAGIC.items() if first.startswith(magic)), "")
