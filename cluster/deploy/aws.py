"""Machines of AWS for a rented cluster: images, a security group of its own, tags on everything.

Raises `harness.aws.AwsError` for what AWS refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from harness import aws
from harness.aws import AwsError, explained
from harness.cluster.deploy.rent import Cluster, Role, first_boot
from harness.errors import HarnessError
from harness.record.manifest import Tier

client = cache(aws.client)
"""To make one costs more than a question."""
TAG = "harness-cluster"
HEAD_TIER = "aws-m7a.xlarge"
"""The head serves nothing: a small machine without accelerators, always on-demand."""
HEAD_DISK_GIB = 100
GPU_IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""The newest AWS Deep Learning Base AMI with NVIDIA's driver, by its public SSM parameter."""
CPU_IMAGE = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
"""Canonical's Ubuntu of the same release: Ray wants one Python on all nodes."""
KINDS = {
    # kind: (paginator, outer list, inner list, id, filter on its state, states that still cost or could)
    "machine": ("describe_instances", "Reservations", "Instances", "InstanceId", "instance-state-name",
                ("pending", "running", "shutting-down", "stopping", "stopped")),
    "disk": ("describe_volumes", "Volumes", None, "VolumeId", "status", ("creating", "available", "in-use", "error")),
    "spot request": ("describe_spot_instance_requests", "SpotInstanceRequests", None, "SpotInstanceRequestId", "state",
                     ("open", "active")),
    "security group": ("describe_security_groups", "SecurityGroups", None, "GroupId", None, ()),
}  # fmt: skip
"""What AWS may have of a cluster, and how to ask for it."""


class Aws:
    """A `cluster.deploy.rent.Provider`."""

    def account(self, cluster: Cluster) -> str:
        """The account that pays, as AWS knows these credentials."""
        with explained("AWS account"):
            return str(client("sts", cluster.tier.region).get_caller_identity()["Account"])

    def configuration(self, cluster: Cluster, *, rent: bool) -> Mapping[str, object]:
        """Region and node types; with ``rent`` today's images by id, and a security group that is made now."""
        tier, head = cluster.tier, cluster.head
        group = _make_security_group(cluster) if rent else "made-by-harness-cluster-up"

        def image(name: str) -> str:
            if not rent:
                return f"newest of {name}"
            with explained("machine image"):
                return str(client("ssm", tier.region).get_parameter(Name=name)["Parameter"]["Value"])

        workers = _machine(cluster, tier, "worker", image(GPU_IMAGE if tier.accelerator else CPU_IMAGE), group)
        return {
            "provider": {"type": "aws", "region": tier.region, "cache_stopped_nodes": False},
            "auth": {"ssh_user": "ubuntu"},
            "available_node_types": {
                "head": {"resources": {}, "node_config": _machine(cluster, head, "head", image(CPU_IMAGE), group)},
                "worker": {"min_workers": cluster.nodes, "max_workers": cluster.nodes, "resources": {},
                           "node_config": workers},
            },
        }  # fmt: skip

    def workers(self, cluster: Cluster) -> int:
        """Machines of the role that run."""
        tag = {"Key": "harness-role", "Value": "worker"}
        return sum(m["State"]["Name"] == "running" and tag in m["Tags"] for m in _find(cluster, "machine"))

    def end(self, cluster: Cluster) -> None:
        """Cancel spot requests, end machines, and remove the security group once none is left in it."""
        ec2 = client("ec2", cluster.tier.region)
        with explained("ending a cluster"):
            if requests := [one["SpotInstanceRequestId"] for one in _find(cluster, "spot request")]:
                ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=requests)
            machines = list(_find(cluster, "machine"))
            if ids := [one["InstanceId"] for one in machines if one["State"]["Name"] != "shutting-down"]:
                ec2.terminate_instances(InstanceIds=ids)
        for group in [] if machines else _find(cluster, "security group"):
            try:
                with explained("security group"):
                    ec2.delete_security_group(GroupId=group["GroupId"])
            except AwsError as e:
                if e.code not in ("DependencyViolation", "InvalidGroup.NotFound"):  # in use a moment longer, or gone
                    raise

    def left(self, cluster: Cluster) -> list[str]:
        """What AWS still has with the cluster's tag."""
        return [f"{kind} {one[KINDS[kind][3]]}" for kind in KINDS for one in _find(cluster, kind)]


def _find(cluster: Cluster, kind: str) -> Iterator[Any]:
    """Everything of a kind with the cluster's tag that is not gone."""
    call, outer, inner, _, state, alive = KINDS[kind]
    filters = [{"Name": f"tag:{TAG}", "Values": [cluster.name]}]
    filters += [{"Name": state, "Values": list(alive)}] if state else []
    with explained(f"what is left: {kind}s"):
        for page in client("ec2", cluster.tier.region).get_paginator(call).paginate(Filters=filters):
            for item in page[outer]:
                yield from item[inner] if inner else [item]


def _tags(cluster: Cluster) -> list[dict[str, str]]:
    created = cluster.created.strftime("%Y-%m-%dT%H:%M:%SZ")
    tags = {TAG: cluster.name, "harness-owner": cluster.owner, "harness-created": created}
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _machine(cluster: Cluster, tier: Tier, role: Role, image: str, group: str) -> dict[str, object]:
    """What EC2's RunInstances gets for one role."""
    tags = [*_tags(cluster), {"Key": "harness-role", "Value": role}]
    tagged = ["instance", "volume"]
    market: dict[str, object] = {}
    if tier.purchase == "spot":
        tagged.append("spot-instances-request")
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        market = {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": options}}
    size = HEAD_DISK_GIB if role == "head" else cluster.disk_gib
    disk = {"VolumeSize": size, "VolumeType": "gp3", "DeleteOnTermination": True, "Encrypted": True}
    return {
        "InstanceType": tier.instance,
        "ImageId": image,
        "SecurityGroupIds": [group],
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [{"ResourceType": what, "Tags": tags} for what in tagged],
        "UserData": first_boot(cluster, role),
        **market,
    }


def _make_security_group(cluster: Cluster) -> str:
    """A group of the cluster's own: SSH from its CIDR, everything between its members, nothing else in.

    Ray's own would let SSH in from everywhere.
    """
    ec2 = client("ec2", cluster.tier.region)
    with explained("security group"):
        vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
        if not vpcs:
            raise HarnessError(f"{cluster.tier.region} has no default VPC; make one: aws ec2 create-default-vpc")
        group = str(ec2.create_security_group(
            GroupName=f"harness-{cluster.name}", Description="harness cluster: SSH and its own members",
            VpcId=vpcs[0]["VpcId"], TagSpecifications=[{"ResourceType": "security-group", "Tags": _tags(cluster)}],
        )["GroupId"])  # fmt: skip
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22,
               "IpRanges": [{"CidrIp": cluster.ssh_from, "Description": "SSH"}]}  # fmt: skip
        own = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, own])
    return group
