"""The verbs that rent machines: cluster up, status, down."""

from __future__ import annotations

import getpass
import ipaddress
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from harness.cli.options import JSON_OPTION
from harness.cli.types import Parsed
from harness.cli.verb import Group
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, UsageError

if TYPE_CHECKING:
    from cluster.deploy.rent import Provider

MY_ADDRESS = "https://checkip.amazonaws.com"


def _cidr(text: str) -> str:
    try:
        return str(ipaddress.IPv4Network(text, strict=False))
    except ValueError as e:
        raise UsageError(f"{text!r} is not an IPv4 network ({e}): write 203.0.113.7/32") from e


def _provider(name: str) -> Provider:
    """Raises `UsageError` for one from which nothing is rented here."""
    from cluster.deploy.aws import Aws

    if name != "aws":
        raise UsageError(
            f"{name}: only AWS machines are rented from here; start the machines yourself and join them with "
            f"'ray start' (cluster/README.md), then set RAY_ADDRESS"
        )
    return Aws()


@click.group(cls=Group, short_help="Rent, watch and end a Ray cluster on AWS.")
def cluster() -> None:
    """Rent a Ray cluster on AWS for one hardware tier, watch what it costs, end it and prove that nothing is left.

    For machines you already have, of any provider, see cluster/README.md.
    """


@cluster.command(
    short_help="Rent machines of one tier and start Ray on them.",
    epilog="""\b
Examples:
  harness cluster up --tier aws-g6.xlarge --nodes 2 --dry-run
  harness cluster up --tier aws-p5.48xlarge --nodes 4 --max-hours 3
""",
)
@click.option("--tier", metavar="NAME", required=True, help="Hardware of the workers, its region and purchase option.")
@click.option("--nodes", type=click.IntRange(1, 1000), default=1, show_default=True, help="Workers.")
@click.option("--name", metavar="NAME", help="Name of the cluster. Default: the tier's.")
@click.option("--head", metavar="TIER", help="A CPU tier for the head node. Default: aws-m7a.xlarge.")
@click.option("--max-hours", type=click.FloatRange(0.25, 24 * 14), default=8.0, show_default=True,
              help="Every node ends itself after this long, whatever happens to this machine.")  # fmt: skip
@click.option("--idle-minutes", type=click.IntRange(min=30), default=60, show_default=True,
              help="The cluster ends itself when no harness ran on its head, and nobody was logged in, for so "
              "long.")  # fmt: skip
@click.option("--disk-gib", type=click.IntRange(75, 16_000), help="Disk of a worker. Default: fits the tier's weights.")
@click.option("--ssh-from", type=Parsed("cidr", _cidr), metavar="CIDR",
              help="Who may connect by SSH. Default: this machine's address.")  # fmt: skip
@click.option("--owner", metavar="NAME", help="Whom to ask about it; becomes a tag. Default: your user name.")
@click.option("--yes", is_flag=True, help="Rent without asking.")
@click.option("--dry-run", is_flag=True, help="Print the dollars and the configuration for ray up; rent nothing.")
def up(
    tier: str, nodes: int, name: str | None, head: str | None, max_hours: float, idle_minutes: int,
    disk_gib: int | None, ssh_from: str | None, owner: str | None, yes: bool, dry_run: bool,
) -> int:  # fmt: skip
    """Rent machines of one tier and start Ray on them.

    Says first what an hour costs, and asks. Then 'ray up' starts a small head and the workers, with the same versions
    of harness, engine and Ray as here. Needs AWS credentials that may use EC2, IAM (Ray makes a role for the head), SSM
    and STS.
    """
    from dataclasses import replace

    from cluster.catalogue.tiers import get_tier
    from cluster.deploy import rent
    from cluster.deploy.aws import HEAD_TIER
    from harness.cli.output import say

    workers = get_tier(tier)
    provider = _provider(workers.provider)
    asked = rent.new_cluster(
        workers, get_tier(head or HEAD_TIER), name=name, nodes=nodes, max_hours=max_hours, idle_minutes=idle_minutes,
        disk_gib=disk_gib, ssh_from=ssh_from or "", owner=owner or getpass.getuser(),
        now=datetime.now(UTC).replace(microsecond=0),
    )  # fmt: skip
    if not dry_run:
        if any(known.name == asked.name for known in rent.known_clusters()):
            raise UsageError(f"there is a cluster {asked.name} already: 'harness cluster status', or choose a --name")
        asked = replace(asked, account=provider.account(asked), ssh_from=ssh_from or _my_address())
        if left := provider.left(asked):
            raise HarnessError(f"something with the tag harness-cluster={asked.name} is there already: {left}")
    for line in rent.price(asked):
        say(line)
    if dry_run:
        sys.stdout.write(rent.as_text(rent.ray_config(asked, provider.configuration(asked, rent=False))))
        say("nothing was rented (--dry-run)")
        return EXIT_VALID
    if not yes and not sys.stdin.isatty():
        raise UsageError("renting costs money: answer on a terminal, or say --yes")
    if not yes and not click.confirm(f"Rent this in account {asked.account}, region {workers.region}?", err=True):
        say("nothing was rented")
        return EXIT_FAILURE
    rent.up(asked, provider, say)
    print(asked.name)
    return EXIT_VALID


@cluster.command(short_help="Workers, hours and dollars so far.")
@click.argument("name", required=False)
@click.option("--tier", metavar="NAME", help="The cluster of this tier.")
@JSON_OPTION
def status(name: str | None, tier: str | None, format_: str) -> int:
    """Show the clusters that were rented from this machine: workers that run, dollars so far at most."""
    from cluster.deploy import rent
    from harness.cli.output import print_json, print_table, say

    now, rows = datetime.now(UTC), []
    for one in [rent.choose(name, tier)] if name or tier else rent.known_clusters():
        provider = _provider(one.tier.provider)
        rent.check_account(one, provider)
        rows.append({
            "name": one.name, "region": one.tier.region, "tier": one.tier.name, "nodes": one.nodes,
            "running": provider.workers(one), "usd_so_far": round(one.usd(now), 2),
            "usd_per_hour": round(one.usd_per_hour, 4), "ends": one.deadline.isoformat(), "price_date": one.tier.date,
        })  # fmt: skip
    if format_ == "json":
        print_json(rows)
    elif rows:
        print_table(tuple(rows[0]), [tuple(map(str, row.values())) for row in rows])
        say("dollars: as if all machines had run since they were asked for; disks, addresses and traffic come on top")
    else:
        say(f"no cluster was rented from this machine ({rent.folder()})")
    return EXIT_VALID


@cluster.command(short_help="End a cluster, prove that nothing is left, say what it cost.")
@click.argument("name", required=False)
@click.option("--tier", metavar="NAME", help="The cluster of this tier.")
def down(name: str | None, tier: str | None) -> int:
    """End a cluster and prove that nothing of it is left: machines, disks, spot requests, security groups.

    Exit status 0 only when AWS shows nothing of it any more; else what is left is listed, and the status is 1.
    """
    from cluster.deploy import rent
    from harness.cli.output import say

    chosen = rent.choose(name, tier)
    return EXIT_VALID if rent.down(chosen, _provider(chosen.tier.provider), say) else EXIT_FAILURE


def _my_address() -> str:
    """The address of this machine as AWS sees it, as a CIDR of one. Raises `UsageError` when that cannot be learned."""
    from harness.server.question import ask

    try:
        answer = ask(MY_ADDRESS, headers={}, deadline_s=5.0, most_bytes=100)
        return f"{ipaddress.IPv4Address(answer.body.decode().strip())}/32"
    except (HarnessError, ValueError) as e:
        raise UsageError(f"who may use SSH? This machine's address is not known ({e}): give --ssh-from CIDR") from e
