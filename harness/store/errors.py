"""What went wrong between us and S3, in words: `StoreError`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Literal

from harness import aws
from harness.aws import AwsError
from harness.errors import HarnessError


class StoreError(HarnessError):
    """An object cannot be read or written. ``transient``: it may work later as it is. ``conflict``: another object is
    there, or the one that was to be replaced is not there any more.
    """

    def __init__(self, url: str, problem: str, *, transient: bool = False, conflict: bool = False) -> None:
        self.url, self.problem, self.transient, self.conflict = url, problem, transient, conflict
        super().__init__(f"{url}: {problem}")


@contextmanager
def explained(url: str, what: Literal["write", "read", "list", "delete"]) -> Iterator[None]:
    """Errors of botocore as `StoreError`. They never hold the secret; its id may be in the store's own words."""
    from botocore.exceptions import FlexibleChecksumError

    needs = {"write": "s3:PutObject, s3:GetObject and s3:ListBucket", "read": "s3:GetObject", "list": "s3:ListBucket",
             "delete": "s3:DeleteObject"}  # fmt: skip
    try:
        with aws.explained(url, needs[what]):
            yield
    except AwsError as e:
        if isinstance(e.__cause__, FlexibleChecksumError):
            raise damaged(url) from e
        if e.code == "NoSuchBucket":
            bucket = url.removeprefix("s3://").partition("/")[0]
            problem = f"there is no bucket {bucket}; make it, or check the name and the endpoint"
        elif e.code in MISSING:
            problem = f"there is no such object ({e.code})"
        elif e.code in EXISTS:
            problem = "exists already; nothing is overwritten: choose another name"
        elif e.code in ON_THE_WAY:
            problem = f"damaged on the way: the store got other bytes than were sent ({e.code})"
        elif e.refusal == "unreachable":
            problem = f"the store is out of reach: {e.problem}; AWS_ENDPOINT_URL_S3 may name another"
        else:
            problem = e.problem
        later = e.refusal in ("unreachable", "busy") or e.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        raise StoreError(url, problem, transient=later or e.code in ON_THE_WAY, conflict=e.code in EXISTS) from e


EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict")
MISSING = ("NoSuchKey", "404")
ON_THE_WAY = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
"""The store got other bytes than were sent."""


def disk_error(url: str, e: OSError) -> StoreError:
    """What went wrong on this machine while ``url`` was read."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(url, "the disk is full; free some space, or point HARNESS_CACHE or TMPDIR elsewhere")
    return StoreError(url, f"cannot be kept: {e.filename or 'the file'}: {e.strerror or e}")


def damaged(url: str) -> StoreError:
    """Bytes that are not those which were stored."""
    return StoreError(url, "damaged: its bytes do not have the checksum it was stored with; read or send it again")


def broke_off(e: Exception) -> bool:
    """Trouble of the stream, and not of the disk."""
    return type(e).__module__.startswith(("botocore", "urllib3", "http", "ssl")) or isinstance(e, ConnectionError)
