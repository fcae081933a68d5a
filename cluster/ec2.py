"""Questions and orders to AWS about a cluster, by its tags: who pays, which image, which machines, what is left.

Endpoints may be set in the environment (AWS_ENDPOINT_URL_EC2, ..._SSM, ..._STS), as for every AWS tool.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any

from cluster.cloud import CPU_IMAGE, GPU_IMAGE, Cluster, Node
from harness.errors import HarnessError, UsageError

CONNECT_S = 5
READ_S = 30
ATTEMPTS = 4
LEFT = ("pending", "running", "shutting-down", "stopping", "stopped")
"""States of a machine that is not gone."""
SPOT_OPEN = ("open", "active")

_TAG = "harness-cluster"
_UNKNOWN = (
    "AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "ExpiredToken",
    "ExpiredTokenException", "RequestExpired", "OptInRequired",
)  # fmt: skip
_DENIED = ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException")


@cache
def client(service: str, region: str) -> Any:
    """A client with deadlines and retries, kept: making one costs more than a question."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_S, read_timeout=READ_S, retries={"mode": "standard", "total_max_attempts": ATTEMPTS}
    )
    with explained(f"AWS {service}"):
        return boto3.session.Session().client(service, region_name=region, config=config)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """AWS's refusals as `HarnessError` that says what to do."""
    from botocore import exceptions as boto

    try:
        yield
    except boto.ClientError as e:
        error = e.response.get("Error", {})
        code, said = str(error.get("Code", "?")), str(error.get("Message", ""))[:300]
        if code in _UNKNOWN:
            raise HarnessError(f"{what}: AWS refuses these credentials ({code}); renew them, or set AWS_PROFILE") from e
        if code in _DENIED:
            raise HarnessError(f"{what}: these AWS credentials may not do this ({code}: {said})") from e
        raise HarnessError(f"{what}: {code}: {said}") from e
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as e:
        keys = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise HarnessError(f"{what}: no usable AWS credentials ({e}): {keys}") from e
    except boto.BotoCoreError as e:
        raise HarnessError(f"{what}: {e}; check the network and proxy") from e


def account(region: str) -> str:
    """The account that pays, as AWS knows these credentials."""
    with explained("AWS account"):
        return str(client("sts", region).get_caller_identity()["Account"])


def image(region: str, *, gpu: bool) -> str:
    """Id of today's image: AWS's with NVIDIA's driver, or plain Ubuntu."""
    with explained("machine image"):
        answer = client("ssm", region).get_parameter(Name=GPU_IMAGE if gpu else CPU_IMAGE)
    return str(answer["Parameter"]["Value"])


def check_instance(region: str, instance: str) -> None:
    """Raises `UsageError` when the region has no such machine, or it is no x86-64."""
    from botocore.exceptions import ClientError

    with explained(f"instance type {instance}"):
        try:
            found = client("ec2", region).describe_instance_types(InstanceTypes=[instance])["InstanceTypes"]
        except ClientError as e:
            if e.response.get("Error", {}).get("Code") != "InvalidInstanceType":
                raise
            found = []
    if not found:
        raise UsageError(f"{region} has no {instance}: another tier, or another region in your own tiers file")
    if "x86_64" not in found[0].get("ProcessorInfo", {}).get("SupportedArchitectures", ["x86_64"]):
        raise UsageError(f"{instance} is no x86-64 machine: the images and engine builds used here are")


def make_security_group(cluster: Cluster, ssh_from: str) -> str:
    """A group of the cluster's own: SSH from ``ssh_from`` (CIDR), everything between its members, nothing else in."""
    ec2 = client("ec2", cluster.region)
    with explained("security group"):
        vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
        if not vpcs:
            raise HarnessError(f"{cluster.region} has no default VPC; make one: aws ec2 create-default-vpc")
        tags = [{"Key": key, "Value": value} for key, value in cluster.tags.items()]
        group = str(ec2.create_security_group(
            GroupName=f"harness-{cluster.name}", Description="harness cluster: SSH and its own members",
            VpcId=vpcs[0]["VpcId"], TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
        )["GroupId"])  # fmt: skip
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22,
               "IpRanges": [{"CidrIp": ssh_from, "Description": "SSH"}]}  # fmt: skip
        own = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, own])
    return group


def nodes(cluster: Cluster) -> list[Node]:
    """Every machine with the cluster's tag that EC2 still knows, also ended ones."""
    with explained("machines"):
        pages = client("ec2", cluster.region).get_paginator("describe_instances").paginate(Filters=_ours(cluster))
        found = [item for page in pages for group in page["Reservations"] for item in group["Instances"]]
    return sorted((_node(item) for item in found), key=lambda node: (node.role, node.started, node.id))


def _node(item: dict[str, Any]) -> Node:
    tags = {tag["Key"]: tag["Value"] for tag in item.get("Tags", [])}
    # "User initiated (2026-11-22 02:31:05 GMT)"
    told = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) GMT\)", item.get("StateTransitionReason") or "")
    return Node(
        id=item["InstanceId"], role="head" if tags.get("harness-role") == "head" else "worker",
        instance=item.get("InstanceType", "?"), state=item["State"]["Name"], started=item["LaunchTime"].astimezone(UTC),
        ended=datetime.strptime(told[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC) if told else None,
    )  # fmt: skip


def terminate(cluster: Cluster, ids: list[str]) -> None:
    """End these machines."""
    with explained("ending machines"):
        client("ec2", cluster.region).terminate_instances(InstanceIds=ids)


def cancel_spot_requests(cluster: Cluster) -> None:
    """Cancel what could still start machines."""
    ec2 = client("ec2", cluster.region)
    with explained("spot requests"):
        ids = _spot_requests(ec2, cluster)
        if ids:
            ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=ids)


def delete_security_groups(cluster: Cluster) -> None:
    """Remove the cluster's own groups; one that is still in use stays."""
    from botocore.exceptions import ClientError

    ec2 = client("ec2", cluster.region)
    with explained("security group"):
        for group in _security_groups(ec2, cluster):
            try:
                ec2.delete_security_group(GroupId=group)
            except ClientError as e:
                if e.response.get("Error", {}).get("Code") not in ("DependencyViolation", "InvalidGroup.NotFound"):
                    raise


def leftovers(cluster: Cluster) -> dict[str, list[str]]:
    """What AWS still has with the cluster's tag, by kind: machines, disks, spot requests, security groups."""
    ec2 = client("ec2", cluster.region)
    with explained("what is left"):
        volumes = [
            f"{volume['VolumeId']} ({volume['Size']} GiB, {volume['State']})"
            for page in ec2.get_paginator("describe_volumes").paginate(Filters=_ours(cluster))
            for volume in page["Volumes"]
            if volume["State"] not in ("deleting", "deleted")
        ]
        return {
            "machines": [f"{node.id} ({node.instance}, {node.state})" for node in nodes(cluster) if node.state in LEFT],
            "disks": volumes,
            "spot requests": _spot_requests(ec2, cluster),
            "security groups": _security_groups(ec2, cluster),
        }


def _spot_requests(ec2: Any, cluster: Cluster) -> list[str]:
    filters = [*_ours(cluster), {"Name": "state", "Values": list(SPOT_OPEN)}]
    pages = ec2.get_paginator("describe_spot_instance_requests").paginate(Filters=filters)
    return [item["SpotInstanceRequestId"] for page in pages for item in page["SpotInstanceRequests"]]


def _security_groups(ec2: Any, cluster: Cluster) -> list[str]:
    pages = ec2.get_paginator("describe_security_groups").paginate(Filters=_ours(cluster))
    return [group["GroupId"] for page in pages for group in page["SecurityGroups"]]


def _ours(cluster: Cluster) -> list[dict[str, Any]]:
    return [{"Name": f"tag:{_TAG}", "Values": [cluster.name]}]


def wait_until(done: Callable[[], bool], deadline_s: float, every_s: float) -> bool:
    """Ask until it is so or the deadline is over; whether it is."""
    end = time.monotonic() + deadline_s
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(every_s)
    return True
