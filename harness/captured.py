"""Captured answers of a run: what each request was answered, by request id, beside its result rows.

Off by default. ``answers-<worker>.arrows`` (Arrow IPC stream, readable by its owner alone, never sent to a store) has
these columns:

===========  ===========  =============================================================================================
column       type         meaning
===========  ===========  =============================================================================================
request_id   int64        as in the result rows; answers that failed are left out
hmac         binary(32)   HMAC-SHA256 of the answer's text (UTF-8, without reasoning). The key is random, made for the
                          run and never written: equal answers of one run are equal here, and nothing can be looked up
text         string       the text itself, with ``--keep-text`` alone; otherwise null
===========  ===========  =============================================================================================
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pyarrow as pa

from harness.errors import ResultsError
from harness.record.results import whole_batches
from harness.untrusted import open_arrow

SCHEMA_VERSION = "1"
KEY_VARIABLE = "HARNESS_CAPTURE_KEY"
"""Environment variable by which all load workers of a run get the same key, in hexadecimal digits."""
KEY_BYTES = 32
SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("hmac", pa.binary(hashlib.sha256().digest_size), nullable=False),
        pa.field("text", pa.string()),
    ],
    metadata={"harness.answers": SCHEMA_VERSION},
)


class CapturedWriter:
    """Writes captured answers as one Arrow batch per `flush`. Raises `OSError` when the file cannot be made."""

    def __init__(self, path: Path, key: bytes, *, keep_text: bool) -> None:
        self._key, self._keep_text = key, keep_text
        self._rows: list[tuple[int, bytes, str | None]] = []
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)

    def append(self, request_id: int, text: str) -> None:
        """Keep the answer to a request until the next `flush`."""
        digest = hmac.digest(self._key, text.encode("utf-8", "replace"), "sha256")
        self._rows.append((request_id, digest, text if self._keep_text else None))

    def flush(self) -> None:
        """Write what was appended; from any thread, one at a time."""
        rows, self._rows = self._rows, []
        if rows:
            columns = [pa.array(values, type=f.type) for values, f in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            self._file.flush()

    def close(self) -> None:
        """Flush, and end the stream. Safe to call twice."""
        if not self._file.closed:
            self.flush()
            self._writer.close()
            self._file.close()


def read_captured(path: Path) -> pa.Table:
    """The captured answers of one worker; every complete batch of a file that was cut short.

    Raises `ResultsError` when it is missing or not a file of captured answers.
    """
    try:
        with open_arrow(path) as source:
            reader = pa.ipc.open_stream(source)
            if not reader.schema.equals(SCHEMA, check_metadata=True):
                raise ResultsError(f"{path}: not a file of captured answers of version {SCHEMA_VERSION}")
            table = whole_batches(reader)
        table.validate(full=True)
        return table
    except FileNotFoundError as e:
        raise ResultsError(f"{path}: no such file") from e
    except (pa.ArrowException, OSError) as e:
        raise ResultsError(f"{path}: not a file of captured answers ({e})") from e
