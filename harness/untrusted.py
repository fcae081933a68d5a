"""What others wrote, read within bounds: any file may be a pipe, endless, or nested ten thousand levels deep."""

from __future__ import annotations

import errno
import stat
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import UsageError

DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises for bytes that are not what was asked for; RecursionError is JSON nested too deep."""
TOML_BYTES = 2**20


def check_regular(path: Path) -> int:
    """Bytes of a regular file. Raises `OSError` for others: to open a pipe waits for ever, a device has no end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return found.st_size


def read_regular(path: Path, most_bytes: int) -> bytes:
    """All bytes of a regular file. Raises `OSError` when it is none, or larger."""
    size = check_regular(path)
    with path.open("rb") as file:
        raw = file.read(min(size, most_bytes) + 1)
    if len(raw) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes / 2**20:g} MiB", str(path))
    return raw


def open_arrow(path: Path) -> Any:
    """A regular file for Arrow to read. Raises `OSError`."""
    import pyarrow as pa

    check_regular(path)
    return pa.OSFile(str(path), "rb")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file that somebody wrote by hand. Raises `UsageError`."""
    try:
        return tomllib.loads(read_regular(path, TOML_BYTES).decode())
    except OSError as e:
        raise UsageError(f"{path}: cannot read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:  # of UTF-8 and of numbers without end, too
        problem = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise UsageError(f"{path}: not a TOML file: {problem}") from e
