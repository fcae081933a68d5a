"""Rent a Ray cluster on AWS for one tier, say what it costs, end it and prove that nothing is left."""

from __future__ import annotations

import getpass
import ipaddress
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.commands.output import print_json, print_table, say
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, UsageError
from harness.question import ask

if TYPE_CHECKING:
    from cluster.cloud import Cluster

UP_S = 45 * 60.0
"""A node's image, engine and Ray are up by then, or not at all."""
WORKERS_S = 20 * 60.0
DOWN_S = 15 * 60.0
GONE_S = 10 * 60.0
"""EC2 takes minutes to let a machine with many GPUs go."""
POLL_S = 5.0
MY_ADDRESS = "https://checkip.amazonaws.com"


def up(
    tier: str, nodes: int, name: str | None, head: str | None, max_hours: float, idle_minutes: int,
    disk_gib: int | None, ssh_from: str | None, owner: str | None, dry_run: bool,
    confirm: Callable[[str], bool],
) -> int:  # fmt: skip
    """Say what it costs, ask, rent, wait until the machines run."""
    from cluster import cloud, ec2
    from cluster.tiers import get_tier

    rented = get_tier(tier)
    cluster = cloud.new_cluster(
        name or cloud.default_name(rented), rented, get_tier(head or cloud.HEAD_TIER), nodes=nodes,
        max_hours=max_hours, idle_minutes=idle_minutes, disk_gib=disk_gib, owner=owner or _user(),
        now=datetime.now(UTC).replace(microsecond=0),
    )  # fmt: skip
    if dry_run:
        say_cost(cluster)
        images = {"head": f"newest of {cloud.CPU_IMAGE}", "worker": f"newest of {_image_name(cluster)}"}
        sys.stdout.write(cloud.as_yaml(cloud.ray_config(cluster, cloud.folder() / cluster.name, images)))
        say("nothing was rented (--dry-run)")
        return EXIT_VALID
    if (cloud.folder() / cluster.name / "state.json").exists():
        raise UsageError(f"there is a cluster {cluster.name} already: 'harness cluster status', or choose a --name")
    ray = ray_command()
    cluster.account = ec2.account(cluster.region)
    if left := {kind: ids for kind, ids in ec2.leftovers(cluster).items() if ids}:
        raise HarnessError(f"something with the tag harness-cluster={cluster.name} is there already: {left}")
    for which in {cluster.tier.instance, cluster.head.instance}:
        ec2.check_instance(cluster.region, which)
    images = {
        "head": ec2.image(cluster.region, gpu=False),
        "worker": ec2.image(cluster.region, gpu=cluster.tier.accelerator is not None),
    }
    from_where = ssh_from or my_address()
    say_cost(cluster)
    if not confirm(f"Rent this in account {cluster.account}, region {cluster.region}?"):
        say("nothing was rented")
        return EXIT_FAILURE
    folder = cloud.write_cluster(cluster)
    try:
        cloud.stage(folder, gpu=cluster.tier.accelerator is not None)
        cluster.security_group = ec2.make_security_group(cluster, from_where)
        cloud.write_cluster(cluster)
        (folder / "cluster.yaml").write_text(cloud.as_yaml(cloud.ray_config(cluster, folder, images)))
        say(f"ray up: the head is started and set up; what it says is in {folder / 'ray.log'}")
        run_ray([ray, "up", "-y", "--no-config-cache", str(folder / "cluster.yaml")], folder, UP_S)
        running = wait_for_workers(cluster)
    except BaseException:
        say(f"machines may be running and cost money; end them: harness cluster down {cluster.name}")
        raise
    say(f"{running} of {cluster.nodes} workers run, with the head; all end themselves at {cluster.deadline:%F %T} UTC")
    config = folder / "cluster.yaml"
    say(f"use it:   ray attach {config}    and there: RAY_ADDRESS=auto harness replay ... --tier {cluster.tier.name}")
    say(f"end it:   harness cluster down {cluster.name}")
    print(cluster.name)
    return EXIT_VALID if running == cluster.nodes else EXIT_FAILURE


def say_cost(cluster: Cluster) -> None:
    """What will be rented and its price, before it is."""
    from cluster.tiers import full_note

    tier, head = cluster.tier, cluster.head
    what = f"{tier.accelerator_count} x {tier.accelerator}" if tier.accelerator else f"{tier.vcpu} vCPU"
    say(f"cluster {cluster.name} in {cluster.region}: {cluster.nodes} x {tier.instance} ({what}, {tier.purchase}, "
        f"{cluster.disk_gib} GiB disk) and a head {head.instance}")  # fmt: skip
    say(f"  {cluster.usd_per_hour:,.2f} USD/h = {cluster.nodes} x {tier.usd_per_hour:g} + {head.usd_per_hour:g}; "
        f"at most {cluster.usd_per_hour * cluster.max_hours:,.2f} USD in the {cluster.max_hours:g} h after which every "
        f"node ends itself; disks, addresses and traffic come on top")  # fmt: skip
    for which in (tier, head):
        elsewhere = f", for {which.region}" if which.region != cluster.region else ""
        note = full_note(which)
        say(f"  {which.instance}: {which.usd_per_hour:g} USD/h read {which.date}{elsewhere}; {which.source}"
            + (f" ({note})" if note else ""))  # fmt: skip


def wait_for_workers(cluster: Cluster) -> int:
    """Workers that run, once all do or the time is over."""
    from cluster import ec2

    running = -1

    def all_run() -> bool:
        nonlocal running
        before = running
        running = sum(n.state == "running" and n.role == "worker" for n in look(cluster))
        if running != before:
            say(f"workers: {running} of {cluster.nodes}")
        return running >= cluster.nodes

    if not ec2.wait_until(all_run, WORKERS_S, POLL_S):
        say(f"only {running} of {cluster.nodes} workers came; quota or capacity, see: ray exec ... 'ray status'")
    return running


def status(name: str | None, tier: str | None, format_: str) -> int:
    """Nodes, hours and dollars so far, of one cluster or all known here."""
    from cluster import cloud

    chosen = [choose(name, tier)] if name or tier else cloud.known_clusters()
    now = datetime.now(UTC)
    rows = []
    for cluster in chosen:
        check_account(cluster)
        found = look(cluster)
        hours = cluster.node_hours(now)
        rows.append(
            {
                "name": cluster.name, "region": cluster.region, "tier": cluster.tier.name, "nodes": cluster.nodes,
                "running": sum(n.state == "running" and n.role == "worker" for n in found),
                "head": next((n.state for n in found if n.role == "head" and n.alive), "gone"),
                "node_hours": round(sum(hours.values()), 3), "usd_so_far": round(cluster.usd(now), 2),
                "usd_per_hour": round(cluster.usd_per_hour, 4), "ends": cluster.deadline.isoformat(),
                "price_date": cluster.tier.date,
            }
        )  # fmt: skip
    if format_ == "json":
        print_json(rows)
        return EXIT_VALID
    if not rows:
        say(f"no cluster was rented from this machine ({cloud.folder()})")
        return EXIT_VALID
    columns = ("name", "region", "tier", "running", "head", "node_hours", "usd_so_far", "usd_per_hour", "ends")
    shown = [{**row, "running": f"{row['running']} of {row['nodes']}"} for row in rows]
    print_table(columns, [tuple(str(row[column]) for column in columns) for row in shown])
    say("dollars: hours of every machine seen, at the prices of its tier; disks, addresses and traffic come on top")
    return EXIT_VALID


def down(name: str | None, tier: str | None) -> int:
    """End the cluster, prove that nothing is left, say what it cost."""
    from cluster import cloud, ec2

    cluster = choose(name, tier)
    folder = cloud.folder() / cluster.name
    check_account(cluster)
    look(cluster)
    if (folder / "cluster.yaml").exists():
        try:
            run_ray([ray_command(), "down", "-y", str(folder / "cluster.yaml")], folder, DOWN_S)
        except HarnessError as e:
            say(f"{e}; the machines are ended without it")
    else:
        say("ray up never ran for it")
    ec2.cancel_spot_requests(cluster)
    if ids := [node.id for node in look(cluster) if node.alive]:
        say(f"ray down left {len(ids)} machines: {', '.join(ids)}; they are ended now")
        ec2.terminate(cluster, ids)
    left: dict[str, list[str]] = {}

    def gone() -> bool:
        nonlocal left
        found = look(cluster)
        if late := [node.id for node in found if node.alive]:  # a head that was not gone yet may have started them
            ec2.terminate(cluster, late)
        if all(node.state == "terminated" for node in found):
            ec2.delete_security_groups(cluster)
        left = ec2.leftovers(cluster)
        return not any(left.values())

    say("waiting until AWS shows nothing of it any more")
    proven = ec2.wait_until(gone, GONE_S, POLL_S)
    now = datetime.now(UTC)
    hours, usd = cluster.node_hours(now), cluster.usd(now)
    say(f"it cost about {usd:,.2f} USD: {hours['worker']:.2f} h of {cluster.tier.instance} at "
        f"{cluster.tier.usd_per_hour:g} (read {cluster.tier.date}) and {hours['head']:.2f} h of "
        f"{cluster.head.instance} at {cluster.head.usd_per_hour:g} (read {cluster.head.date}); disks, addresses and "
        f"traffic come on top")  # fmt: skip
    tag = f"harness-cluster={cluster.name}"
    if not proven:
        for kind, ids in left.items():
            for id_ in ids:
                say(f"LEFT, {kind}: {id_}")
        say(f"this still costs money: try again, or end it in the console (tag {tag}, region {cluster.region}, "
            f"account {cluster.account})")  # fmt: skip
        return EXIT_FAILURE
    shutil.rmtree(folder, ignore_errors=True)
    say(f"nothing is left: AWS shows no {', '.join(left)} with the tag {tag} in {cluster.region} ({now:%F %T} UTC)")
    return EXIT_VALID


def check_account(cluster: Cluster) -> None:
    """Raises `HarnessError` with another account's credentials: to them nothing of the cluster is there any more."""
    from cluster import ec2

    asked = ec2.account(cluster.region)
    if cluster.account not in (None, asked):
        raise HarnessError(
            f"cluster {cluster.name} was rented in AWS account {cluster.account}, and these credentials are of account "
            f"{asked}, which cannot see it: set AWS_PROFILE to that of account {cluster.account}"
        )


def look(cluster: Cluster) -> list[Any]:
    """The cluster's machines as EC2 tells of them now; remembered, for the bill."""
    from cluster import cloud, ec2

    found = ec2.nodes(cluster)
    cluster.learn(found, datetime.now(UTC))
    cloud.write_cluster(cluster)
    return found


def choose(name: str | None, tier: str | None) -> Cluster:
    """The cluster of this name, or of this tier, or the only one there is. Raises `UsageError`."""
    from cluster import cloud

    if name:
        return cloud.read_cluster(name)
    known = [c for c in cloud.known_clusters() if tier in (None, c.tier.name)]
    if len(known) != 1:
        names = ", ".join(c.name for c in known) or "none"
        raise UsageError(f"which cluster? Known here{f' of tier {tier}' if tier else ''}: {names}; name it")
    return known[0]


def run_ray(argv: list[str], folder: Path, deadline_s: float) -> None:
    """Run a ``ray`` command to its end, its words into ray.log. Raises `HarnessError` when it fails or is too slow."""
    from cluster.process import Process, describe_exit

    what = " ".join(argv[1:2])
    with Process.start(argv, name=f"ray {what}", env={"RAY_USAGE_STATS_ENABLED": "0"}, log=folder / "ray.log") as ray:
        end = time.monotonic() + deadline_s
        while (code := ray.wait(1.0)) is None:
            if time.monotonic() > end:
                raise HarnessError(f"ray {what} did not end in {deadline_s / 60:.0f} minutes; see {folder / 'ray.log'}")
    if code:
        last = "".join(f"\n  {line}" for line in ray.tail(8))
        raise HarnessError(f"ray {what} failed ({describe_exit(code)}); see {folder / 'ray.log'}{last}")


def ray_command() -> str:
    """The ``ray`` program: on PATH, else beside this Python. Raises `UsageError`."""
    found = shutil.which("ray") or shutil.which("ray", path=str(Path(sys.executable).parent))
    if not found:
        raise UsageError("no 'ray' program here; install the harness with its [cluster] extra")
    return found


def my_address() -> str:
    """The address of this machine as AWS sees it, as a CIDR of one. Raises `UsageError` when that cannot be learned."""
    try:
        answer = ask(MY_ADDRESS, headers={}, deadline_s=5.0, most_bytes=100)
        return f"{ipaddress.IPv4Address(answer.body.decode().strip())}/32"
    except (HarnessError, ValueError) as e:
        raise UsageError(f"who may use SSH? This machine's address is not known ({e}): give --ssh-from CIDR") from e


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def _image_name(cluster: Cluster) -> str:
    from cluster import cloud

    return cloud.GPU_IMAGE if cluster.tier.accelerator else cloud.CPU_IMAGE
