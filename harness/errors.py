"""Every error this project raises on purpose.

The tree::

    HarnessError            exit 1   something failed; the message says what, where and what to do
    ├── UsageError          exit 2   the request itself is wrong: option, name, combination
    ├── TraceError          exit 1   a trace file cannot be read as what it claims to be (file:line)
    ├── PlanError           exit 1   a plan cannot be built from this trace or read back
    ├── ResultsError        exit 1   a run directory or result file is missing, torn or of another schema
    ├── ServerError         exit 1   a model server did not start, died, or does not answer as one
    ├── WorkerError         exit 1   a load worker did not start or died
    ├── StoreError          exit 1   an object on S3 cannot be read or written (`harness.store.objects`)
    └── RefusedError        exit 1   a cloud's price service refused us (`cluster.catalogue.prices`)

A failed *request* is never an exception: it is a result row with its error class (`harness.record.results.ERRORS`).
"""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

_NAME_CHARS, _LOOKED_AT = 100, 1000  # a server or file may name anything, and any number of it
EXIT_VALID = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INVALID = 3
EXIT_SLO_MISSED = 4
EXIT_NOT_DECIDED = 5
"""Too small, or not judged: measured, and no verdict either way."""


class HarnessError(Exception):
    """Base of the tree; ``exit_code`` is what the command line ends with."""

    exit_code = EXIT_FAILURE


class UsageError(HarnessError):
    """What was asked for is not possible: an unknown name or options that exclude each other."""

    exit_code = EXIT_USAGE


class TraceError(HarnessError):
    """A trace cannot be read. ``file`` and ``line`` (1-based, None when it is about the whole file) say where."""

    def __init__(self, file: str, line: int | None, problem: str) -> None:
        self.file, self.line, self.problem = file, line, problem
        super().__init__(f"{file}:{line}: {problem}" if line is not None else f"{file}: {problem}")


class PlanError(HarnessError):
    """A plan cannot be built or read."""


class ResultsError(HarnessError):
    """A run directory or a result file cannot be read."""


class ServerError(HarnessError):
    """A model server failed; ``log_tail`` holds its last lines, oldest first."""

    def __init__(self, message: str, log_tail: Iterable[str] = ()) -> None:
        self.log_tail = list(log_tail)
        super().__init__(message if not self.log_tail else message + "\n  " + "\n  ".join(self.log_tail))


class WorkerError(HarnessError):
    """A load worker failed."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UsageError:
    """UsageError for a name that is not in ``valid``, with the nearest valid ones."""
    valid = sorted(one[:_NAME_CHARS] for one in valid)
    near = difflib.get_close_matches(name[:_NAME_CHARS], valid[:_LOOKED_AT], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {listed(valid)}"
    return UsageError(f"unknown {kind} {name[:_NAME_CHARS]!r}: {hint}")


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names in one line, the first ``most`` of them."""
    more = len(names) - most
    return (", ".join(names[:most]) or "none") + (f" and {more:,} more" if more > 0 else "")


_LIMITS = {
    errno.EMFILE: "raise the limit of open files (ulimit -n 65536)",
    errno.ENFILE: "this machine has no more open files to give",
    errno.ENOMEM: "free some memory, or raise the limit (ulimit -v unlimited)",
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your share of that disk",
    errno.EAGAIN: "raise the limits of threads and memory (ulimit -u, ulimit -v)",
}


_SAID: tuple[tuple[type[Exception], str, int], ...] = (
    (ImportError, "failed to map segment", errno.ENOMEM),  # the dynamic loader, of an extension module
    (OSError, "failed to map segment", errno.ENOMEM),  # the same, of any library
    (RuntimeError, "can't start new thread", errno.EAGAIN),  # CPython; pthread_create's own number is lost there
)
"""Limits of the machine that come without a number: what is said of them. The only words of others that are looked for,
and they decide nothing but the advice in a sentence.
"""


def _limit_met(error: Exception) -> int | None:
    """The errno of the limit that this is about; None: it is about none."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return next((met for kind, said, met in _SAID if isinstance(error, kind) and said in str(error)), None)


def sentence(error: Exception) -> str:
    """What went wrong, of an error that nobody foresaw: what, where, and what to do."""
    if isinstance(error, RecursionError):
        return f"something in the input is nested too deeply to be read ({_where(error)})"
    what = f"{type(error).__name__}: {error}".removesuffix(": ").partition("\n")[0]
    if isinstance(error, OSError):
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part) or what
    elif isinstance(error, MemoryError):
        what = "not enough memory"
    if (advice := _LIMITS.get(_limit_met(error) or 0)) is not None:
        return f"{what}: {advice}"
    more = "-v (or HARNESS_TRACEBACK=1) shows the whole of it, for a report of this fault"
    return f"{what.splitlines()[0]} ({_where(error)}); {more}"


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{Path(last[0].filename).name}:{last[0].lineno}" if last else "unknown place"
