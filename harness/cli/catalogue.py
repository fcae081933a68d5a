"""Hardware tiers and their prices, models, and machines rented of a tier: tiers, models, cluster."""

from __future__ import annotations

import getpass
import ipaddress
import sys
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.output import print_json, print_rows, say
from harness.cli.verb import JSON_OPTION, Group, command, takes
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, UsageError
from harness.option_types import NEW_FILE, Parsed, opt

if TYPE_CHECKING:
    from harness.cluster.deploy.rent import Provider


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshOptions:
    """What ``harness tiers refresh`` takes."""

    names: tuple[str, ...] = opt("This tier (several: repeat). Default: AWS's all.", (), flag="--tier", metavar="NAME")
    region: str | None = opt("Price it here; another region becomes a tier NAME-REGION.", metavar="REGION")
    spot: bool = opt("Also a spot tier NAME-spot for each on-demand one.", False)
    spot_days: float = opt(
        "Days of spot prices to take the mean of, each weighted by how long it held.",
        7.0, kind=click.FloatRange(0, 90, min_open=True),
    )  # fmt: skip
    out: Path | None = opt(
        "Tiers file to write. Default: HARNESS_TIERS, else ~/.config/harness/tiers.toml.",
        kind=NEW_FILE, flag="-o --output --out",
    )  # fmt: skip
    dry_run: bool = opt("Show old and new prices; write nothing.", False)


@click.group(cls=Group, invoke_without_command=True)
@JSON_OPTION
@click.pass_context
def tiers(ctx: click.Context, format_: str) -> int:
    """List the hardware tiers with their prices, each with source and date."""
    if ctx.invoked_subcommand:
        return EXIT_VALID
    import msgspec

    from harness.cli.documents import TierList
    from harness.cluster.catalogue.tiers import full_note, list_tiers, listed

    known = list_tiers()
    rows = [listed(tier) for tier in known]
    if format_ == "json":
        print_json(TierList(tiers=rows))
        return EXIT_VALID
    hardware = "name accelerator accelerator_count vcpu memory_gib"
    print_rows(msgspec.to_builtins(rows), f"{hardware} usd_per_hour usd_per_accelerator_hour purchase region date old")
    print("Price sources:")
    for t in known:
        note = full_note(t)
        print(f"  {t.name}: {t.source}" + (f"\n      {note}" if note else ""))
    return EXIT_VALID


@tiers.command(
    short_help="Read today's AWS prices into your own tiers file.",
    epilog="""\b
Examples:
  harness tiers refresh --dry-run
  harness tiers refresh --tier aws-p5.48xlarge --spot
  harness tiers refresh --tier aws-g6.xlarge --region eu-central-1
""",
)
@takes(RefreshOptions)
@JSON_OPTION
def refresh(format_: str, asked: RefreshOptions) -> int:
    """Read today's AWS prices into your own tiers file, whose entries replace the shipped ones.

    On-demand prices come from the AWS Price List API, spot prices from EC2's history, zone by zone. Needs AWS
    credentials (environment, profile or role) that may call pricing:GetProducts and ec2:DescribeSpotPriceHistory.
    The shipped prices are never changed; without credentials or network nothing is.
    """
    from harness.cli.documents import TierChange, TierChanges
    from harness.cluster.catalogue.prices import refresh
    from harness.cluster.catalogue.tiers import own_file, write_tiers

    file = asked.out or own_file()
    changes = refresh(
        asked.names, region=asked.region, spot=asked.spot, spot_days=asked.spot_days, files=[own_file(), file]
    )
    new = [change.after for change in changes if change.after is not None]
    if new and not asked.dry_run:
        write_tiers(file, new)
    if format_ == "json":
        print_json(TierChanges(changes=[
            TierChange(name=c.name, before=c.before, after=c.after, problem=c.problem, change=c.ratio) for c in changes
        ]))  # fmt: skip
    else:
        print_rows(
            [
                {"tier": c.name, "was": c.before and c.before.usd_per_hour, "now": c.after and c.after.usd_per_hour,
                 "change": None if c.ratio is None else f"{c.ratio:+.1%}",
                 "source": c.problem or (c.after and c.after.source)}
                for c in changes
            ],
            "tier was now change source",
        )  # fmt: skip
    where = "; nothing written (--dry-run)" if asked.dry_run else f", in {file}" if new else ""
    say(f"{len(new)} of {len(changes)} prices read{where}")
    return EXIT_VALID if len(new) == len(changes) else EXIT_FAILURE


@command()
@click.option(
    "--fetch", metavar="NAME", help="Get this model's weights now (checked and kept; a second time costs nothing)."
)
@JSON_OPTION
def models(fetch: str | None, format_: str) -> int:
    """List the models that can be served, or fetch the weights of one.

    Your own models file, HARNESS_MODELS or ~/.config/harness/models.toml, adds entries and replaces those of the same
    name; cluster/catalogue/models.toml shows the fields. A folder with config.json and weights
    needs no entry: --model ./FOLDER.
    """
    import msgspec

    from harness.cli.documents import ModelList
    from harness.cluster.catalogue import models as catalogue
    from harness.cluster.catalogue.weights import ensure_weights

    if fetch:
        print(ensure_weights(catalogue.get_model(fetch), say=say))
        return EXIT_VALID
    known = catalogue.list_models()
    listed = [catalogue.listed(model) for model in known]
    if format_ == "json":
        print_json(ModelList(models=listed))
        return EXIT_VALID
    rows = msgspec.to_builtins(listed)
    for row in rows:
        for name, unit, key in (("GiB", 2**30, "weight_bytes"), ("KV_KiB/token", 1024, "kv_bytes_per_token"),
                                ("parameters_(1e9)", 1e9, "parameters")):  # fmt: skip
            row[name] = None if row[key] is None else row[key] / unit
        row |= {"model": row["name"], "format": row["quantization"] or row["dtype"], "longest": row["max_model_len"],
                "weights": row["source"] + (" (gated)" if row["gated"] else "")}  # fmt: skip
    print_rows(rows, "model parameters_(1e9) format GiB KV_KiB/token longest weights licence")
    for m in known:
        print(f"  {m.name}: {m.note}")
    print("Any of them as NAME:dummy: the same architecture with random weights, nothing to download, speed only.")
    return EXIT_VALID


MY_ADDRESS = "https://checkip.amazonaws.com"


def _cidr(text: str) -> str:
    try:
        return str(ipaddress.IPv4Network(text, strict=False))
    except ValueError as e:
        raise UsageError(f"{text!r} is not an IPv4 network ({e}): write 203.0.113.7/32") from e


def _provider(name: str) -> Provider:
    from harness.cluster.deploy.aws import Aws

    if name != "aws":
        raise UsageError(
            f"{name}: only AWS machines are rented from here; start the machines yourself and join them with "
            f"'ray start' (cluster/README.md), then set RAY_ADDRESS"
        )
    return Aws()


@dataclass(frozen=True, slots=True, kw_only=True)
class RentOptions:
    """What ``harness cluster up`` takes."""

    tier: str = opt("Hardware of the workers, its region and purchase option.", metavar="NAME", required=True)
    nodes: int = opt("Workers.", 1, kind=click.IntRange(1, 1000))
    name: str | None = opt("Name of the cluster. Default: the tier's.", metavar="NAME")
    max_hours: float = opt(
        "Every node ends itself after this long, whatever happens to this machine.",
        8.0, kind=click.FloatRange(0.25, 24 * 14),
    )  # fmt: skip
    ssh_from: str | None = opt(
        "Who may connect by SSH. Default: this machine's address.", kind=Parsed("cidr", _cidr), metavar="CIDR"
    )
    yes: bool = opt("Rent without asking.", False)
    dry_run: bool = opt("Print the dollars and the configuration for ray up; rent nothing.", False)


@click.group(cls=Group)
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
@takes(RentOptions)
def up(asked: RentOptions) -> int:
    """Rent machines of one tier and start Ray on them.

    Says first what an hour costs, and asks. Then 'ray up' starts a small head and the workers, with the same versions
    of harness, engine and Ray as here. Needs AWS credentials that may use EC2, IAM (Ray makes a role for the head), SSM
    and STS.
    """
    from harness.cluster.catalogue.tiers import get_tier
    from harness.cluster.deploy import rent
    from harness.cluster.deploy.aws import HEAD_TIER

    workers = get_tier(asked.tier)
    provider = _provider(workers.provider)
    wanted = rent.Cluster(
        name=rent.default_name(workers) if asked.name is None else asked.name, tier=workers, head=get_tier(HEAD_TIER),
        nodes=asked.nodes, max_hours=asked.max_hours, ssh_from=asked.ssh_from or "", owner=getpass.getuser(),
        created=datetime.now(UTC).replace(microsecond=0),
    )  # fmt: skip
    rent.check(wanted)
    if not asked.dry_run:
        if any(known.name == wanted.name for known in rent.known_clusters()):
            raise UsageError(f"there is a cluster {wanted.name} already: 'harness cluster status', or choose a --name")
        wanted = replace(wanted, account=provider.account(wanted), ssh_from=asked.ssh_from or _my_address())
        if left := provider.left(wanted):
            raise HarnessError(f"something with the tag harness-cluster={wanted.name} is there already: {left}")
    for line in rent.price(wanted):
        say(line)
    if asked.dry_run:
        sys.stdout.write(rent.as_text(rent.ray_config(wanted, provider.configuration(wanted, rent=False))))
        say("nothing was rented (--dry-run)")
        return EXIT_VALID
    if not asked.yes and not sys.stdin.isatty():
        raise UsageError("renting costs money: answer on a terminal, or say --yes")
    if not asked.yes and not click.confirm(
        f"Rent this in account {wanted.account}, region {workers.region}?", err=True
    ):
        say("nothing was rented")
        return EXIT_FAILURE
    rent.up(wanted, provider, say)
    print(wanted.name)
    return EXIT_VALID


@cluster.command(short_help="Workers, hours and dollars so far.")
@click.argument("name", required=False)
@JSON_OPTION
def status(name: str | None, format_: str) -> int:
    """Show the clusters that were rented from this machine: workers that run, dollars so far at most."""
    from harness.cli.documents import ClusterList, RentedCluster
    from harness.cluster.deploy import rent

    now, rows = datetime.now(UTC), []
    for one in [rent.choose(name)] if name else rent.known_clusters():
        provider = _provider(one.tier.provider)
        rent.check_account(one, provider)
        rows.append(RentedCluster(
            name=one.name, region=one.tier.region, tier=one.tier.name, nodes=one.nodes,
            running=provider.workers(one), usd_so_far=round(one.usd(now), 2),
            usd_per_hour=round(one.usd_per_hour, 4), ends=one.deadline.isoformat(), price_date=one.tier.date,
        ))  # fmt: skip
    if format_ == "json":
        print_json(ClusterList(clusters=rows))
    elif rows:
        print_rows([asdict(row) for row in rows], " ".join(field.name for field in fields(RentedCluster)))
        say("dollars: as if all machines had run since they were asked for; disks, addresses and traffic come on top")
    else:
        say(f"no cluster was rented from this machine ({rent.folder()})")
    return EXIT_VALID


@cluster.command(short_help="End a cluster, prove that nothing is left, say what it cost.")
@click.argument("name", required=False)
def down(name: str | None) -> int:
    """End a cluster and prove that nothing of it is left: machines, disks, spot requests, security groups.

    Exit status 0 only when AWS shows nothing of it any more; else what is left is listed, and the status is 1.
    """
    from harness.cluster.deploy import rent

    chosen = rent.choose(name)
    return EXIT_VALID if rent.down(chosen, _provider(chosen.tier.provider), say) else EXIT_FAILURE


def _my_address() -> str:
    """The address of this machine as AWS sees it, as a CIDR of one. Raises `UsageError` when that cannot be learned."""
    from harness.server.question import ask

    try:
        answer = ask(MY_ADDRESS, headers={}, deadline_s=5.0, most_bytes=100)
        return f"{ipaddress.IPv4Address(answer.body.decode().strip())}/32"
    except (HarnessError, ValueError) as e:
        raise UsageError(f"who may use SSH? This machine's address is not known ({e}): give --ssh-from CIDR") from e
