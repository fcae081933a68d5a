"""Objects on S3, or on anything that speaks its protocol: ``s3://BUCKET/KEY``.

Region, credentials and endpoint (AWS_ENDPOINT_URL_S3) come from the environment, as for every AWS tool. Nothing is
overwritten unless that is asked for. What goes up is checked there, part by part, against its SHA-256, and the whole
file's SHA-256 is kept with the object. What comes down is checked against that, or against the object's own checksum
when another tool put it there. s3transfer, boto3's own way to send files, cannot refuse to overwrite.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from harness import aws
from harness.aws import code_of
from harness.errors import UsageError
from harness.store.errors import EXISTS, MISSING, StoreError, broke_off, damaged, disk_error, explained

PART_BYTES = 8 << 20
"""Files above this go up in parts of it (S3 refuses parts below 5 MiB, and more than 10,000 of them)."""
CONNECT_S = 10
READ_S = 60
BREAKS = 4
"""How often one download may break off."""
SLOWEST_BYTES_PER_S = 128 << 10
SLACK_S = 300.0
"""A transfer may take this long and its size at the slowest rate; then it fails."""

_CONNECTIONS = 10


@dataclass(frozen=True, slots=True)
class Stored:
    """One object of a listing."""

    name: str
    """Its key below the URL that was listed."""
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


def connect() -> Any:
    """A client with deadlines and retries; one may be used by several threads. Costs about as much as a request."""
    with explained("s3://", "read"):
        return aws.client("s3", connect_timeout=CONNECT_S, read_timeout=READ_S, max_pool_connections=_CONNECTIONS)


# --- up ------------------------------------------------------------------------------------------------------------


def upload(path: Path, url: str, *, client: Any = None, overwrite: bool = False) -> None:
    """Put what the file holds now at ``url`` and verify that it arrived. The same bytes there already are as good.

    Raises `StoreError` when another object is there (unless ``overwrite``), or it cannot be written whole and in time.
    """
    bucket, key = split_url(url)
    client = client or connect()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            sha256 = _sha256(file, size)
            with explained(url, "write"):
                # Not every store knows If-None-Match: ask first, too.
                known = _head(client, bucket, key)
                if known is not None and _is(known, size, sha256):
                    return
                if known is not None and not overwrite:
                    raise _other(url)
                send = _put if size <= PART_BYTES else _put_in_parts
                when = {} if overwrite else NEW
                checksum = send(client, bucket, key, file, size, sha256, when)
                _verify(client, url, size, sha256, checksum)
    except OSError as e:
        raise StoreError(url, f"{path} cannot be read ({e.strerror or e})") from e


NEW = {"IfNoneMatch": "*"}
"""Refused where an object of this name is."""


def put(data: bytes, url: str, *, client: Any = None, replaces: str | None = None) -> str:
    """Put these few bytes at ``url`` and return their ETag; the same bytes there already are as good.

    They replace the object with the ETag ``replaces``; null: none. Where it is otherwise: `StoreError`, ``conflict``.
    """
    bucket, key = split_url(url)
    client = client or connect()
    when = NEW if replaces is None else {"IfMatch": replaces}
    with explained(url, "write"):
        _put(client, bucket, key, io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest(), when)
        known = _head(client, bucket, key)
    if known is None:
        raise StoreError(url, "was written, and is not there", transient=True)
    return str(known["ETag"])


def get(url: str, *, client: Any = None) -> tuple[bytes, str] | None:
    """The bytes of a small object and its ETag; null when there is none. Raises `StoreError`."""
    client = client or connect()
    with explained(url, "read"):
        known = _head(client, *split_url(url))
    if known is None:
        return None
    out = io.BytesIO()
    fetch(url, out, client=client)
    return out.getvalue(), str(known["ETag"])


def _put(client: Any, bucket: str, key: str, file: IO[bytes], size: int, sha256: str, when: Mapping[str, str]) -> str:
    """One request. Returns the checksum that S3 then has of it."""
    from botocore.exceptions import ClientError

    data = _read_exactly(file, size)
    checksum = _base64(hashlib.sha256(data).digest())
    try:
        client.put_object(
            Bucket=bucket, Key=key, Body=data, ChecksumSHA256=checksum, Metadata={"sha256": sha256}, **when
        )
    except ClientError as e:
        # Our own request may have arrived although its answer did not: then the retry finds its own object.
        if code_of(e) not in EXISTS or (known := _head(client, bucket, key)) is None:
            raise
        if not _is(known, size, sha256):
            raise _other(f"s3://{bucket}/{key}") from e
    return checksum


def _put_in_parts(
    client: Any, bucket: str, key: str, file: IO[bytes], size: int, sha256: str, when: Mapping[str, str]
) -> str:
    """Multipart upload, aborted when it fails. Returns the checksum of its parts' checksums."""
    from botocore.exceptions import ClientError

    url = f"s3://{bucket}/{key}"
    part_bytes = max(PART_BYTES, -(-size // 9000 // 2**20) * 2**20)
    deadline = _deadline(size)
    target = {"Bucket": bucket, "Key": key}
    begun = client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256", Metadata={"sha256": sha256})
    target["UploadId"] = begun["UploadId"]
    parts: list[dict[str, Any]] = []
    digests = b""
    try:
        for number, start in enumerate(range(0, size, part_bytes), 1):
            if time.monotonic() > deadline:
                raise StoreError(url, f"too slow: {start:,} of {size:,} bytes sent in time", transient=True)
            data = _read_exactly(file, min(part_bytes, size - start))
            digest = hashlib.sha256(data).digest()
            digests += digest
            part = {"PartNumber": number, "ChecksumSHA256": _base64(digest)}
            parts.append(part | {"ETag": client.upload_part(**target, **part, Body=data)["ETag"]})
        try:
            client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, **when)
        except ClientError as e:
            if code_of(e) not in (*EXISTS, "NoSuchUpload") or (known := _head(client, bucket, key)) is None:
                raise
            if not _is(known, size, sha256):
                raise _other(url) from e
    except BaseException:
        # Parts of an upload that nobody ends are kept, and billed, for ever.
        with suppress(Exception):
            client.abort_multipart_upload(**target)
        raise
    return f"{_base64(hashlib.sha256(digests).digest())}-{len(parts)}"


def _read_exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise OSError(errno.EIO, "the file became shorter while it was sent")
    return data


def _sha256(file: IO[bytes], size: int) -> str:
    """Of the first ``size`` bytes (the file may be growing); rewinds it."""
    digest, left = hashlib.sha256(), size
    while left and (chunk := file.read(min(left, 1 << 20))):
        digest.update(chunk)
        left -= len(chunk)
    file.seek(0)
    return digest.hexdigest()


def _is(known: Mapping[str, Any], size: int, sha256: str) -> bool:
    """Whether an object holds just these bytes."""
    return bool(known["ContentLength"] == size and known.get("Metadata", {}).get("sha256") == sha256)


def _other(url: str) -> StoreError:
    return StoreError(
        url, "exists already, with other content; nothing is overwritten: choose another name", conflict=True
    )


def _verify(client: Any, url: str, size: int, sha256: str, checksum: str) -> None:
    """Ask for what is there now. A store that keeps no checksum has to give the bytes back."""
    known = _head(client, *split_url(url)) or {}
    if known.get("ContentLength") != size:
        raise StoreError(url, f"{size:,} bytes were sent, the store has {known.get('ContentLength')}", transient=True)
    told = known.get("ChecksumSHA256")
    if told is None:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # not a file of ours
            arrived = fetch(url, nowhere, client=client) == sha256
    else:
        arrived = told == checksum
    if not arrived:
        raise StoreError(
            url, "damaged on the way: the store's checksum is not the file's; send it again under another name"
        )


# --- down ----------------------------------------------------------------------------------------------------------


def download(url: str, path: Path, *, client: Any = None) -> None:
    """The object as a file, whole and verified or not at all. Raises `StoreError`; ``path`` may not exist."""
    if path.exists():
        raise StoreError(url, f"{path} exists already; nothing is overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                fetch(url, file, client=client)
            Path(name).rename(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise disk_error(url, e) from e


def fetch(url: str, out: IO[bytes], *, client: Any = None) -> str:
    """Write the object's bytes to ``out`` (from where it stands) and return their SHA-256; goes on where it broke off.

    Raises `StoreError` when it cannot be read, breaks off again and again, or is not what was stored.
    """
    from botocore.exceptions import FlexibleChecksumError

    bucket, key = split_url(url)
    client = client or connect()
    start, digest, got, failures = out.tell() if out.seekable() else 0, hashlib.sha256(), 0, 0
    deadline: float | None = None
    expected: str | None = None
    while True:
        # Pieces are verified by the SHA-256 of the whole; without one, botocore verifies an answer from its start.
        resume = {"Range": f"bytes={got}-"} if got and expected else {}
        with explained(url, "read"):
            answer = client.get_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED", **resume)
        if got and answer["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.PARTIAL_CONTENT:
            digest, got = hashlib.sha256(), 0
            if out.seekable():
                out.seek(start)
                out.truncate()
        expected = answer.get("Metadata", {}).get("sha256")
        size = got + answer["ContentLength"]
        deadline = deadline or _deadline(size)
        try:
            for chunk in answer["Body"].iter_chunks(1 << 20):
                digest.update(chunk)
                _write(url, out, chunk)
                got += len(chunk)
                if time.monotonic() > deadline:
                    raise StoreError(url, f"too slow: {got:,} of {size:,} bytes read in time", transient=True)
        except Exception as e:
            if not broke_off(e):
                raise
            if isinstance(e, FlexibleChecksumError):
                raise damaged(url) from e
            failures += 1
            if failures >= BREAKS:
                raise StoreError(url, f"the stream broke off {failures} times ({e})", transient=True) from e
            time.sleep(0.1 * 2**failures)
            continue
        finally:
            answer["Body"].close()
        if expected not in (None, digest.hexdigest()):
            raise damaged(url)
        _write(url, out, None)
        return digest.hexdigest()


def _write(url: str, out: IO[bytes], chunk: bytes | None) -> None:
    """To the file, or with null: to the disk."""
    try:
        out.flush() if chunk is None else out.write(chunk)
    except OSError as e:
        raise disk_error(url, e) from e


# --- looking -------------------------------------------------------------------------------------------------------


def exists(url: str, *, client: Any = None) -> bool:
    """Whether there is an object of this very name. Raises `StoreError` when that cannot be told."""
    with explained(url, "read"):
        return _head(client or connect(), *split_url(url)) is not None


def list_objects(url: str, *, client: Any = None, alone: bool = False) -> list[Stored]:
    """Everything below ``url``, by name; with ``alone`` the object of this very name too. Raises `StoreError`."""
    bucket, key = split_url(url)
    prefix = key if alone else f"{key}/"
    found: list[Stored] = []
    with explained(url, "list"):
        for page in (client or connect()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                # What is only named alike (runs/a and runs/a-2) is neither.
                if item["Key"].startswith(f"{key}/") or (alone and item["Key"] == key):
                    name = item["Key"].removeprefix(f"{key}/")
                    there = f"s3://{bucket}/{item['Key']}"
                    found.append(Stored(name, there, item["Size"], item["ETag"], item["LastModified"].timestamp()))
    return sorted(found, key=lambda stored: stored.name)


def delete(objects: list[Stored], *, client: Any = None) -> None:
    """Remove these objects. Raises `StoreError` for the first that stays."""
    client = client or connect()
    for start in range(0, len(objects), 1000):
        batch = [split_url(stored.url) for stored in objects[start : start + 1000]]
        with explained(objects[start].url, "delete"):
            answer = client.delete_objects(
                Bucket=batch[0][0], Delete={"Objects": [{"Key": key} for _, key in batch], "Quiet": True}
            )
        for error in answer.get("Errors", []):
            raise StoreError(f"s3://{batch[0][0]}/{error.get('Key')}", f"cannot be removed ({error.get('Code')})")


def split_url(url: str | Path) -> tuple[str, str]:
    """(bucket, key). Raises `UsageError`."""
    bucket, _, key = as_url(url).removeprefix("s3://").partition("/")
    if not is_url(url) or not bucket or not key or key.rpartition("/")[2] in (".", ".."):
        raise UsageError(f"{url}: expected s3://BUCKET/KEY")
    return bucket, key


def _head(client: Any, bucket: str, key: str) -> dict[str, Any] | None:
    from botocore.exceptions import ClientError

    try:
        answer: dict[str, Any] = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        return answer
    except ClientError as e:
        if code_of(e) in MISSING:
            return None
        raise


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _deadline(size: int) -> float:
    return time.monotonic() + SLACK_S + size / SLOWEST_BYTES_PER_S
