"""What went wrong between us and S3, in words: botocore's errors as `StoreError`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from harness.errors import HarnessError


class StoreError(HarnessError):
    """An object cannot be read or written. ``transient``: it may work later as it is."""

    def __init__(self, url: str, problem: str, *, transient: bool = False) -> None:
        self.url, self.problem, self.transient = url, problem, transient
        super().__init__(f"{url}: {problem}")


EXISTS = ("PreconditionFailed", "412")
_CREDENTIALS = (
    "SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidSecurity", "ExpiredToken", "InvalidToken",
    "TokenRefreshRequired", "RequestTimeTooSkewed", "AuthFailure", "InvalidClientTokenId",
)  # fmt: skip
_DENIED = ("AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden")
_DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
_RIGHTS = {
    "write": "s3:PutObject, s3:GetObject and s3:ListBucket",
    "read": "s3:GetObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
}


@contextmanager
def explained(url: str, what: str) -> Iterator[None]:
    """Errors of botocore as `StoreError`. They never hold the secret; its id may be in the store's own words."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as e:
        raise _answered(url, what, e) from e
    except (BotoCoreError, ValueError) as e:
        raise _unanswered(url, e) from e


def _answered(url: str, what: str, e: Any) -> StoreError:
    code = code_of(e)
    if code == "NoSuchBucket":
        bucket = url.removeprefix("s3://").partition("/")[0]
        return StoreError(url, f"there is no bucket {bucket} ({code}); make it, or check the name and the endpoint")
    if code in ("NoSuchKey", "404"):
        return StoreError(url, f"there is no such object ({code})")
    if code in _CREDENTIALS:
        return StoreError(url, f"the store refuses these AWS credentials ({code}); renew them, or set AWS_PROFILE")
    if code in _DENIED:
        return StoreError(
            url, f"these AWS credentials are wrong or may not {what} here ({code}); it needs {_RIGHTS[what]}"
        )
    if code in EXISTS:
        return StoreError(url, "exists already; nothing is overwritten: choose another name")
    if code in _DAMAGED:
        return StoreError(url, f"damaged on the way: the store got other bytes than were sent ({code})", transient=True)
    said = str(e.response.get("Error", {}).get("Message", ""))[:200]
    server_side = e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= HTTPStatus.INTERNAL_SERVER_ERROR
    return StoreError(url, f"the store could not {what} it ({code}: {said})", transient=server_side)


def _unanswered(url: str, e: Exception) -> StoreError:
    from botocore import exceptions as boto

    if isinstance(e, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        keys = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StoreError(url, f"no usable AWS credentials ({e}): {keys}")
    if isinstance(e, boto.FlexibleChecksumError):
        return damaged(url)
    reach = isinstance(e, boto.HTTPClientError | boto.ConnectionError)
    hint = "; check the network and AWS_ENDPOINT_URL_S3" if reach else ""
    return StoreError(url, f"the store is out of reach ({e}){hint}" if reach else str(e), transient=reach)


def code_of(e: Any) -> str:
    """The store's own code for what a ClientError is about."""
    return str(e.response.get("Error", {}).get("Code", "?"))


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


def is_checksum(e: Exception) -> bool:
    """Botocore found that the bytes do not have the object's checksum."""
    from botocore.exceptions import FlexibleChecksumError

    return isinstance(e, FlexibleChecksumError)
