"""AWS clients with deadlines, and what AWS refuses as one kind of error with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from harness.errors import HarnessError

CONNECT_S = 5
READ_S = 30
ATTEMPTS = 4
"""Of one call, throttling and server faults included."""
SET_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

Refusal = Literal["credentials", "denied", "busy", "unreachable", "other"]

CODES: dict[str, Refusal] = {
    **dict.fromkeys(
        ("AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch",
         "InvalidSignatureException", "ExpiredToken", "ExpiredTokenException", "RequestExpired", "OptInRequired",
         "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"),
        "credentials",
    ),
    **dict.fromkeys(
        ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AllAccessDisabled", "AccountProblem", "403",
         "Forbidden"),
        "denied",
    ),
    **dict.fromkeys(("Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"), "busy"),
}  # fmt: skip


class AwsError(HarnessError):
    """AWS did not do what it was asked. ``code`` and ``status``: its own word for why and the answer's HTTP status; ""
    and 0 when it did not answer.
    """

    def __init__(self, what: str, problem: str, refusal: Refusal = "other", code: str = "", status: int = 0) -> None:
        self.problem, self.refusal, self.code, self.status = problem, refusal, code, status
        super().__init__(f"{what}: {problem}")


def client(service: str, region: str | None = None, **config: object) -> Any:
    """A client with deadlines and retries; one may be used by several threads. Endpoints may be set in the environment
    (AWS_ENDPOINT_URL_EC2, ..._S3), as for every AWS tool. Raises `AwsError`.
    """
    import boto3
    from botocore.config import Config

    settings = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, **config}
    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    with explained(f"AWS {service}"):
        return boto3.session.Session().client(service, region_name=region, config=Config(retries=retries, **settings))


@contextmanager
def explained(what: str, needs: str = "") -> Iterator[None]:
    """Errors of botocore as `AwsError`; ``needs``: the permissions that the credentials must have."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as e:
        raise _answered(what, needs, e) from e
    except (BotoCoreError, ValueError) as e:
        raise _unanswered(what, e) from e


def code_of(e: Any) -> str:
    """AWS's own code for what a ClientError is about."""
    return str(e.response.get("Error", {}).get("Code", "?"))


def _answered(what: str, needs: str, e: Any) -> AwsError:
    code, said = code_of(e), str(e.response.get("Error", {}).get("Message", ""))[:200]
    refusal = CODES.get(code, "other")
    if refusal == "credentials":
        problem = f"AWS refuses these credentials ({code}: {said}); renew them, or set AWS_PROFILE"
    elif refusal == "denied":
        problem = f"these AWS credentials may not do this ({code}: {said})" + (f"; they need {needs}" if needs else "")
    elif refusal == "busy":
        problem = f"throttled {ATTEMPTS} times ({code}); wait a minute"
    else:
        problem = f"{code}: {said}"
    status = int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    return AwsError(what, problem, refusal, code, status)


def _unanswered(what: str, e: Exception) -> AwsError:
    from botocore import exceptions as boto

    if isinstance(e, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return AwsError(what, f"no usable AWS credentials ({e}): {SET_CREDENTIALS}", "credentials")
    if isinstance(e, boto.ProfileNotFound | boto.NoRegionError):
        return AwsError(what, f"AWS cannot be asked: {e}", "credentials")
    if isinstance(e, boto.HTTPClientError | boto.ConnectionError):
        return AwsError(what, f"AWS is out of reach ({e}); check the network and proxy", "unreachable")
    return AwsError(what, str(e))
