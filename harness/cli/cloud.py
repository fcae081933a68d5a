"""The verbs that rent machines: cluster up, status, down."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

import click

from harness.cli.options import JSON_OPTION
from harness.cli.verb import Group
from harness.errors import UsageError


class Cidr(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """An IPv4 network like ``203.0.113.7/32``."""

    name = "cidr"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The network in its usual form; fails with what is accepted."""
        try:
            return str(ipaddress.IPv4Network(str(value), strict=False))
        except ValueError as e:
            self.fail(f"{value!r} is no IPv4 network ({e}): write 203.0.113.7/32", param, ctx)


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
@click.option(
    "--max-hours",
    type=click.FloatRange(0.25, 24 * 14),
    default=8.0,
    show_default=True,
    help="Every node ends itself after this long, whatever happens to this machine.",
)
@click.option(
    "--idle-minutes",
    type=click.IntRange(min=30),
    default=60,
    show_default=True,
    help="The cluster ends itself when no harness ran on its head, and nobody was logged in, for so long.",
)
@click.option("--disk-gib", type=click.IntRange(75, 16_000), help="Disk of a worker. Default: fits the tier's weights.")
@click.option(
    "--ssh-from", type=Cidr(), metavar="CIDR", help="Who may connect by SSH. Default: this machine's address."
)
@click.option("--owner", metavar="NAME", help="Whom to ask about it; becomes a tag. Default: your user name.")
@click.option("--yes", is_flag=True, help="Rent without asking.")
@click.option("--dry-run", is_flag=True, help="Print the dollars and the configuration for ray up; rent nothing.")
def up(yes: bool, **options: Any) -> int:
    """Rent machines of one tier and start Ray on them.

    Says first what an hour costs, and asks. Then 'ray up' starts a small head and the workers, with the same versions
    of harness, engine and Ray as here. Needs AWS credentials that may use EC2, IAM (Ray makes a role for the head), SSM
    and STS.
    """
    from harness.commands import cloud

    def confirm(question: str) -> bool:
        if yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError("renting costs money: answer on a terminal, or say --yes")
        return click.confirm(question, err=True)

    return cloud.up(confirm=confirm, **options)


@cluster.command(short_help="Nodes, hours and dollars so far.")
@click.argument("name", required=False)
@click.option("--tier", metavar="NAME", help="The cluster of this tier.")
@JSON_OPTION
def status(**options: Any) -> int:
    """Show the clusters that were rented from this machine: nodes that run, hours, dollars so far."""
    from harness.commands import cloud

    return cloud.status(**options)


@cluster.command(short_help="End a cluster, prove that nothing is left, say what it cost.")
@click.argument("name", required=False)
@click.option("--tier", metavar="NAME", help="The cluster of this tier.")
def down(**options: Any) -> int:
    """End a cluster and prove that nothing of it is left: machines, disks, spot requests, security groups.

    Exit status 0 only when AWS shows nothing of it any more; else what is left is listed, and the status is 1.
    """
    from harness.commands import cloud

    return cloud.down(**options)
