"""Objects on S3, or on anything that speaks its protocol: ``s3://BUCKET/KEY``.

Region, credentials and endpoint (AWS_ENDPOINT_URL_S3) come from the environment, as for every AWS tool. Nothing is
overwritten unless that is asked for. Every request carries the SHA-256 of its bytes, which the store checks, and the
whole file's SHA-256 is kept with the object. What comes down is checked against that, or against the object's own
checksum when another tool put it there.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, Literal

from harness import aws
from harness.aws import AwsError, code_of
from harness.errors import HarnessError, UsageError

PART_BYTES = 8 << 20
"""Files above this go up in parts of it (S3 refuses parts below 5 MiB, and more than 10,000 of them)."""
CONNECT_S = 10
READ_S = 60
BREAKS = 4
SLOWEST_BYTES_PER_S = 128 << 10
SLACK_S = 300.0
"""A transfer may take this long and its size at the slowest rate; then it fails."""
NEW = {"IfNoneMatch": "*"}

_CONNECTIONS = 10
_EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict")
_MISSING = ("NoSuchKey", "404")
_ON_THE_WAY = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
"""The store got other bytes than were sent."""
_NEEDS = {"write": "s3:PutObject, s3:GetObject and s3:ListBucket", "read": "s3:GetObject", "list": "s3:ListBucket",
          "delete": "s3:DeleteObject"}  # fmt: skip


class StoreError(HarnessError):
    """An object cannot be read or written. ``transient``: it may work later as it is. ``conflict``: another object is
    there, or the one that was to be replaced is not there any more.
    """

    def __init__(self, url: str, problem: str, *, transient: bool = False, conflict: bool = False) -> None:
        self.url, self.problem, self.transient, self.conflict = url, problem, transient, conflict
        super().__init__(f"{url}: {problem}")


@dataclass(frozen=True, slots=True)
class Stored:
    """One object of a listing."""

    name: str
    url: str
    size: int
    etag: str
    changed_s: float = 0.0
    """When it was written, Unix time by the store's clock."""


def is_url(name: str | Path) -> bool:
    """Whether this names an object on S3. (A `Path` folds the two slashes of a URL into one; that counts.)"""
    return str(name).startswith("s3:/")


def as_url(name: str | Path) -> str:
    """``s3://...`` with its two slashes, and none at the end."""
    return re.sub(r"^s3:/+", "s3://", str(name)).rstrip("/")


def split_url(url: str | Path) -> tuple[str, str]:
    """(bucket, key). Raises `UsageError`."""
    bucket, _, key = as_url(url).removeprefix("s3://").partition("/")
    if not is_url(url) or not bucket or not key or key.rpartition("/")[2] in (".", ".."):
        raise UsageError(f"{url}: expected s3://BUCKET/KEY")
    return bucket, key


def connect() -> Any:
    """A client with deadlines and retries; one may be used by several threads. Costs about as much as a request."""
    with _explained("s3://", "read"):
        return aws.client("s3", connect_timeout=CONNECT_S, read_timeout=READ_S, max_pool_connections=_CONNECTIONS)


# --- up ------------------------------------------------------------------------------------------------------------


def upload(path: Path, url: str, *, client: Any = None, overwrite: bool = False) -> None:
    """Put what the file holds now at ``url``. The same bytes there already are as good.

    Raises `StoreError` when another object is there (unless ``overwrite``), or it cannot be written whole and in time.
    """
    from boto3.s3.transfer import TransferConfig, create_transfer_manager
    from botocore.exceptions import ClientError

    bucket, key = split_url(url)
    client = client if client is not None and overwrite else connect()
    if not overwrite:  # boto3's transfers cannot ask for this themselves
        for operation in ("PutObject", "CompleteMultipartUpload"):
            client.meta.events.register(f"provide-client-params.s3.{operation}", lambda params, **_: params | NEW)
    try:
        with path.open("rb") as file, _explained(url, "write"):
            size = os.fstat(file.fileno()).st_size
            sha256 = hashlib.sha256()
            for chunk in _FirstBytes(file, size, url).chunks():
                sha256.update(chunk)
            file.seek(0)

            def is_there() -> bool:
                known = _head(client, bucket, key)
                if known is None or _is(known, size, sha256.hexdigest()):
                    return known is not None
                if overwrite:
                    return False
                raise StoreError(url, "exists already, with other content; nothing is overwritten: choose another name",
                                 conflict=True)  # fmt: skip

            if is_there():  # not every store knows If-None-Match: asked first, too
                return
            config = TransferConfig(
                multipart_threshold=PART_BYTES, multipart_chunksize=max(PART_BYTES, -(-size // 9000)),
                max_concurrency=1, preferred_transfer_client="classic",
            )  # fmt: skip
            config.max_in_memory_upload_chunks = 2
            kept = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": sha256.hexdigest()}}
            try:
                with create_transfer_manager(client, config) as transfers:
                    transfers.upload(_FirstBytes(file, size, url), bucket, key, extra_args=kept).result()
            except ClientError:
                # Our own request may have arrived although its answer did not: then the retry finds its own object.
                if not is_there():
                    raise
            if not is_there():
                raise StoreError(url, "was written, and the store has something else there", transient=True)
    except OSError as e:
        raise StoreError(url, f"{path} cannot be read ({e.strerror or e})") from e


class _FirstBytes:
    """The first ``size`` bytes of a file that may be growing, to be read in time."""

    def __init__(self, file: IO[bytes], size: int, url: str) -> None:
        self._file, self._size, self._left, self._url = file, size, size, url
        self._deadline = _deadline(size)

    def read(self, most: int = -1) -> bytes:
        if time.monotonic() > self._deadline:
            sent = self._size - self._left
            raise StoreError(self._url, f"too slow: {sent:,} of {self._size:,} bytes sent in time", transient=True)
        wanted = self._left if most < 0 else min(most, self._left)
        data = self._file.read(wanted)
        if len(data) != wanted:
            raise OSError(errno.EIO, "the file became shorter while it was sent")
        self._left -= wanted
        return data

    def chunks(self) -> Iterator[bytes]:
        while self._left:
            yield self.read(1 << 20)


def put(data: bytes, url: str, *, client: Any = None, replaces: str | None = None) -> str:
    """Put these few bytes at ``url`` and return their ETag; the same bytes there already are as good.

    They replace the object with the ETag ``replaces``; null: none. Where it is otherwise: `StoreError`, ``conflict``.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_url(url)
    client = client or connect()
    sha256 = hashlib.sha256(data).hexdigest()
    with _explained(url, "write"):
        try:
            answer = client.put_object(
                Bucket=bucket, Key=key, Body=data, ChecksumAlgorithm="SHA256", Metadata={"sha256": sha256},
                **(NEW if replaces is None else {"IfMatch": replaces}),
            )  # fmt: skip
        except ClientError as e:
            answer = _head(client, bucket, key) if code_of(e) in _EXISTS else None
            if answer is None or not _is(answer, len(data), sha256):
                raise
        return str(answer["ETag"])


# --- down ----------------------------------------------------------------------------------------------------------


def get(url: str, *, client: Any = None) -> tuple[bytes, str] | None:
    """The bytes of a small object and its ETag; null when there is none. Raises `StoreError`."""
    client = client or connect()
    with _explained(url, "read"):
        known = _head(client, *split_url(url))
    if known is None:
        return None
    out = io.BytesIO()
    fetch(url, out, client=client)
    return out.getvalue(), str(known["ETag"])


def download(url: str, path: Path, *, client: Any = None) -> None:
    """The object as a file, whole and verified or not at all. Raises `StoreError`; ``path`` may not exist."""
    if path.exists():
        raise StoreError(url, f"{path} exists already; nothing is overwritten")
    with disk_errors(url):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                fetch(url, file, client=client)
            Path(name).rename(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def fetch(url: str, out: IO[bytes], *, client: Any = None) -> str:
    """Write the object's bytes to ``out`` (from where it stands) and return their SHA-256; goes on where it broke off.

    Raises `StoreError` when it cannot be read, breaks off again and again, or is not what was stored.
    """
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError

    bucket, key = split_url(url)
    client = client or connect()
    start, digest, got, failures = out.tell() if out.seekable() else 0, hashlib.sha256(), 0, 0
    deadline: float | None = None
    expected: str | None = None
    damaged = StoreError(url, "damaged: its bytes do not have the checksum it was stored with; read or send it again")
    while True:
        # Pieces are verified by the SHA-256 of the whole; without one, botocore verifies an answer from its start.
        resume = {"Range": f"bytes={got}-"} if got and expected else {}
        with _explained(url, "read"):
            answer = client.get_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED", **resume)
        if got and answer["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.PARTIAL_CONTENT:
            digest, got = hashlib.sha256(), 0
            out.seek(start)
            out.truncate()
        expected = answer.get("Metadata", {}).get("sha256")
        size = got + answer["ContentLength"]
        deadline = deadline or _deadline(size)
        try:
            for chunk in answer["Body"].iter_chunks(1 << 20):
                digest.update(chunk)
                with disk_errors(url):
                    out.write(chunk)
                got += len(chunk)
                if time.monotonic() > deadline:
                    raise StoreError(url, f"too slow: {got:,} of {size:,} bytes read in time", transient=True)
        except FlexibleChecksumError as e:
            raise damaged from e
        except (BotoCoreError, OSError) as e:
            failures += 1
            if failures >= BREAKS:
                raise StoreError(url, f"the stream broke off {failures} times ({e})", transient=True) from e
            time.sleep(0.1 * 2**failures)
            continue
        finally:
            answer["Body"].close()
        if expected not in (None, digest.hexdigest()):
            raise damaged
        with disk_errors(url):
            out.flush()
        return digest.hexdigest()


# --- looking -------------------------------------------------------------------------------------------------------


def exists(url: str, *, client: Any = None) -> bool:
    """Whether there is an object of this very name. Raises `StoreError` when that cannot be told."""
    with _explained(url, "read"):
        return _head(client or connect(), *split_url(url)) is not None


def list_objects(url: str, *, client: Any = None, alone: bool = False) -> list[Stored]:
    """Everything below ``url``, by name; with ``alone`` the object of this very name too. Raises `StoreError`."""
    bucket, key = split_url(url)
    prefix = key if alone else f"{key}/"
    found: list[Stored] = []
    with _explained(url, "list"):
        for page in (client or connect()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                # What is only named alike (runs/a and runs/a-2) is neither.
                if item["Key"].startswith(f"{key}/") or (alone and item["Key"] == key):
                    name = item["Key"].removeprefix(f"{key}/")
                    there = f"s3://{bucket}/{item['Key']}"
                    found.append(Stored(name, there, item["Size"], item["ETag"], item["LastModified"].timestamp()))
    return sorted(found, key=lambda stored: stored.name)


def delete(urls: list[str], *, client: Any = None) -> None:
    """Remove these objects, one request each. Raises `StoreError` for the first that stays."""
    client = client or connect()
    for url in urls:
        bucket, key = split_url(url)
        with _explained(url, "delete"):
            client.delete_object(Bucket=bucket, Key=key)


def _head(client: Any, bucket: str, key: str) -> Mapping[str, Any] | None:
    from botocore.exceptions import ClientError

    try:
        answer: Mapping[str, Any] = client.head_object(Bucket=bucket, Key=key)
        return answer
    except ClientError as e:
        if code_of(e) in _MISSING:
            return None
        raise


def _is(known: Mapping[str, Any], size: int, sha256: str) -> bool:
    """Whether an object holds just these bytes."""
    return bool(known["ContentLength"] == size and known.get("Metadata", {}).get("sha256") == sha256)


def _deadline(size: int) -> float:
    return time.monotonic() + SLACK_S + size / SLOWEST_BYTES_PER_S


@contextmanager
def _explained(url: str, what: Literal["write", "read", "list", "delete"]) -> Iterator[None]:
    """Errors of botocore as `StoreError`. They never hold the secret; its id may be in the store's own words."""
    try:
        with aws.explained(url, _NEEDS[what]):
            yield
    except AwsError as e:
        if e.code == "NoSuchBucket":
            problem = f"there is no bucket {split_url(url)[0]}; make it, or check the name and the endpoint"
        elif e.code in _MISSING:
            problem = f"there is no such object ({e.code})"
        elif e.code in _EXISTS:
            problem = "exists already; nothing is overwritten: choose another name"
        elif e.code in _ON_THE_WAY:
            problem = f"damaged on the way: the store got other bytes than were sent ({e.code})"
        elif e.refusal == "unreachable":
            problem = f"the store is out of reach: {e.problem}; AWS_ENDPOINT_URL_S3 may name another"
        else:
            problem = e.problem
        later = e.refusal in ("unreachable", "busy") or e.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        raise StoreError(url, problem, transient=later or e.code in _ON_THE_WAY, conflict=e.code in _EXISTS) from e


@contextmanager
def disk_errors(url: str) -> Iterator[None]:
    """What goes wrong on this machine while ``url`` is read, as `StoreError`."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "the disk is full; free some space, or point HARNESS_CACHE or TMPDIR elsewhere"
        else:
            problem = f"cannot be kept: {e.filename or 'the file'}: {e.strerror or e}"
        raise StoreError(url, problem) from e
