"""Renting a cluster: nothing real is ever rented. AWS is a server on loopback that speaks its protocols, and ``ray`` a
program that rents from it what the configuration says."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import ROOT

from harness.cli.catalogue import cluster as verbs
from harness.cluster.catalogue.tiers import get_tier, list_tiers
from harness.cluster.deploy import aws as aws_machines
from harness.cluster.deploy import rent
from harness.cluster.deploy.aws import Aws
from harness.cluster.deploy.placement import NICENESS
from harness.cluster.deploy.rent import Cluster
from harness.errors import HarnessError, UsageError

NOW = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)
SPOT, ON_DEMAND, CPU = "aws-g6.xlarge-spot", "aws-p5.48xlarge", "aws-m7a.xlarge"


def make(tier: str = ON_DEMAND, **changes: Any) -> Cluster:
    return replace(
        Cluster(name="test", tier=get_tier(tier), head=get_tier(CPU), nodes=2, max_hours=8.0, owner="eve", created=NOW,
                ssh_from="203.0.113.7/32"),
        **changes,
    )  # fmt: skip


def config(cluster: Cluster) -> dict[str, Any]:
    return rent.ray_config(cluster, Aws().configuration(cluster, rent=False))


# --- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [t.name for t in list_tiers() if t.provider == "aws" and t.purchase != "owned"])
def test_every_aws_tier_makes_a_configuration_that_ray_takes(name: str) -> None:
    import jsonschema
    import ray.autoscaler

    made = yaml.safe_load(rent.as_text(config(make(name))))
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(made, schema)
    from ray.autoscaler._private.util import prepare_config, validate_config

    full = prepare_config(made)
    validate_config(full)
    assert full["head_setup_commands"] == made["setup_commands"], "nothing of Ray's own defaults comes in"
    assert full["available_node_types"]["worker"]["max_workers"] == 2


@pytest.mark.parametrize("tier", [SPOT, ON_DEMAND])
def test_machines_are_small_targets_and_end_themselves(tier: str) -> None:
    made = config(make(tier))
    for role, node in made["available_node_types"].items():
        machine = node["node_config"]
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert machine["InstanceInitiatedShutdownBehavior"] == "terminate", "power off must not mean keep the disk"
        (disk,) = machine["BlockDeviceMappings"]
        assert disk["Ebs"]["DeleteOnTermination"] and disk["Ebs"]["Encrypted"]
        assert len(machine["SecurityGroupIds"]) == 1
        spot = tier == SPOT and role == "worker"
        assert ("InstanceMarketOptions" in machine) == spot
        tagged = {
            spec["ResourceType"]: {t["Key"]: t["Value"] for t in spec["Tags"]} for spec in machine["TagSpecifications"]
        }
        assert set(tagged) == {"instance", "volume"} | ({"spot-instances-request"} if spot else set())
        for tags in tagged.values():
            assert tags["harness-cluster"] == "test"
            assert tags["harness-owner"] == "eve"
            assert tags["harness-created"] == "2026-11-22T03:00:00Z"
        assert "OnCalendar=2026-11-22 11:00:00 UTC" in machine["UserData"]
    assert made["available_node_types"]["worker"]["min_workers"] == 2
    assert made["available_node_types"]["head"]["node_config"]["InstanceType"] == "m7a.xlarge"
    assert made["provider"]["cache_stopped_nodes"] is False, "stopped machines keep their disks"


def test_what_a_node_gets_is_there() -> None:
    made = config(make())
    for there, here in made["file_mounts"].items():
        if there.startswith("/home/ubuntu/harness/") and not there.endswith("constraints.txt"):
            assert there.removeprefix("/home/ubuntu/harness/") == str(Path(here).relative_to(ROOT))
            assert Path(here).exists()
    assert str(ROOT / "harness") in made["file_mounts"].values()
    assert any("RAY_AUTH_MODE=token" in command for command in made["setup_commands"])
    pins = dict(pin.split("==") for pin in rent._constraints(gpu=True))
    import ray

    assert pins["ray"] == ray.__version__, "Ray wants the same version everywhere"
    assert "vllm" in pins


def test_setup_commands_are_shell(tmp_path: Path) -> None:
    for tier in (ON_DEMAND, CPU):
        made = config(make(tier))
        commands = [c for key, value in made.items() if key.endswith("commands") for c in value]
        script = tmp_path / "script.sh"
        for text in [*commands, *(rent.first_boot(make(tier), role) for role in ("head", "worker"))]:
            script.write_text(text)
            done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, (text, done.stderr)


def test_every_ray_that_is_started_runs_servers_at_nice_0() -> None:
    made = config(make())
    starts = [c for key in ("head", "worker") for c in made[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all(f" {NICENESS}=0 " in c.partition("ray start")[0] for c in starts)
    manual = (ROOT / "cluster" / "README.md").read_text()
    assert f"export {NICENESS}=0\n" in manual[: manual.index("\nray start")]


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """A node's guard with a world of its own: who runs, who is logged in, how long ago it was busy."""
    script = tmp_path / "guard.sh"
    script.write_text(rent.GUARD.replace("/run/cluster-busy", str(tmp_path / "busy")))

    def run(role: str, processes: str = "", users: str = "", quiet_minutes: int = 0) -> bool:
        bin_ = tmp_path / "bin"
        bin_.mkdir(exist_ok=True)
        (bin_ / "ps.txt").write_text(processes)
        pgrep = f'case "$1" in -x) grep -qx "$2" {bin_}/ps.txt;; *) grep -qE "$2" {bin_}/ps.txt;; esac'
        for name, text in {"pgrep": pgrep, "who": f"echo -n '{users}'", "shutdown": f"touch {bin_}/down"}.items():
            (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
            (bin_ / name).chmod(0o755)
        (bin_ / "down").unlink(missing_ok=True)
        mark = tmp_path / "busy"
        mark.touch()
        before = datetime.now().timestamp() - 60 * quiet_minutes
        os.utime(mark, (before, before))
        env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
        subprocess.run(["bash", str(script), role, "60"], env=env, timeout=120, check=True, capture_output=True)
        return (bin_ / "down").exists()

    return run


def test_a_forgotten_cluster_ends_itself(node: Any) -> None:
    harness = "/home/ubuntu/harness-env/bin/python /home/ubuntu/harness-env/bin/harness sweep sweep.toml"
    assert not node("head", quiet_minutes=59)
    assert node("head", quiet_minutes=62)
    assert not node("head", processes=harness, quiet_minutes=600)
    assert not node("head", users="ubuntu pts/0", quiet_minutes=600)
    assert node("head", processes="/home/ubuntu/harness-env/bin/python -m ray", quiet_minutes=600), "Ray alone is idle"
    assert not node("worker", processes="raylet", quiet_minutes=600)
    assert node("worker", processes="ray::IDLE", quiet_minutes=62), "its head is gone"


def test_names_that_cannot_stand_in_a_tag_are_refused() -> None:
    for name in ("", "Großes", "a b", "-x", "x" * 41, "$(rm)"):
        with pytest.raises(UsageError, match="cluster name"):
            rent.check(make(name=name))
    with pytest.raises(UsageError, match="owner"):
        rent.check(make(owner="eve; rm -rf"))
    for tier in list_tiers():
        if tier.provider == "aws":
            rent.check(make(tier.name, name=rent.default_name(tier)))


def test_the_bill_is_at_most_hours_times_dated_price() -> None:
    cluster = make()  # p5.48xlarge
    assert cluster.usd_per_hour == pytest.approx(2 * cluster.tier.usd_per_hour + cluster.head.usd_per_hour)
    assert cluster.usd(NOW + timedelta(hours=3)) == pytest.approx(3 * cluster.usd_per_hour)
    assert cluster.usd(NOW) == 0


class Stub:
    """A cloud of another kind, which only has to be a `Provider`."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def account(self, cluster: Cluster) -> str:
        return "me"

    def configuration(self, cluster: Cluster, *, rent: bool) -> dict[str, object]:
        self.did.append(f"configuration, rent={rent}")
        return {"provider": {"type": "stub"}, "available_node_types": {"head": {}, "worker": {}}}

    def workers(self, cluster: Cluster) -> int:
        return cluster.nodes

    def end(self, cluster: Cluster) -> None:
        self.did.append("end")

    def left(self, cluster: Cluster) -> list[str]:
        self.did.append("left")
        return [] if self.did.count("end") > 1 else ["a machine that takes its time"]


def test_another_cloud_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ran: list[list[str]] = []
    monkeypatch.setattr(rent, "_ray", lambda words, own, deadline_s: ran.append(words))
    monkeypatch.setattr(rent, "POLL_S", 0.0)
    cloud, said = Stub(), list[str]()
    cluster = replace(make(), account="me")
    rent.up(cluster, cloud, said.append)
    own = rent.folder("test")
    assert json.loads((own / "cluster.yaml").read_text())["provider"] == {"type": "stub"}
    assert stat.S_IMODE((own / "auth_token").stat().st_mode) == 0o600
    assert (own / "auth_token").read_text() not in (own / "cluster.yaml").read_text()
    assert rent.choose(None) == cluster
    assert rent.down(cluster, cloud, said.append)
    assert cloud.did == ["configuration, rent=True", "end", "left", "end", "left"]
    assert [words[0] for words in ran] == ["up", "down"]
    assert not own.exists()


# --- a whole life --------------------------------------------------------------------------------------------------


class FakeAws:
    """EC2 (Query, XML), SSM (JSON) and STS (Query): what a cluster asks of them, with the machines in memory."""

    def __init__(self) -> None:
        self.machines: list[dict[str, Any]] = []
        self.volumes: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.rules: list[dict[str, str]] = []
        self.denied: set[str] = set()
        self.stuck = False
        """Machines do not end."""
        self.calls: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if target := self.headers.get("X-Amz-Target"):
                    code, kind, answer = 200, "application/x-amz-json-1.1", fake.ssm(target, json.loads(body))
                else:
                    code, answer = fake.query({k: v[0] for k, v in parse_qs(body.decode()).items()})
                    kind = "text/xml"
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def ssm(self, target: str, request: dict[str, Any]) -> str:
        assert target == "AmazonSSM.GetParameter"
        self.calls.append("GetParameter")
        value = "ami-" + ("gpu" if "deeplearning" in request["Name"] else "cpu")
        return json.dumps({"Parameter": {"Name": request["Name"], "Type": "String", "Value": value}})

    def query(self, request: dict[str, str]) -> tuple[int, str]:
        action = request["Action"]
        self.calls.append(action)
        if action in self.denied:
            error = "<Error><Code>UnauthorizedOperation</Code><Message>not you</Message></Error>"
            return 403, f"<Response><Errors>{error}</Errors></Response>"
        answer = getattr(self, action)(request)
        return 200, f"<{action}Response>{answer}</{action}Response>"

    def GetCallerIdentity(self, request: dict[str, str]) -> str:  # noqa: N802
        return "<GetCallerIdentityResult><Account>123456789012</Account></GetCallerIdentityResult>"

    def DescribeInstanceTypes(self, request: dict[str, str]) -> str:  # noqa: N802
        arch = "arm64" if "g." in request["InstanceType.1"] else "x86_64"
        supported = (
            f"<processorInfo><supportedArchitectures><item>{arch}</item></supportedArchitectures></processorInfo>"
        )
        return f"<instanceTypeSet><item><instanceType>x</instanceType>{supported}</item></instanceTypeSet>"

    def DescribeVpcs(self, request: dict[str, str]) -> str:  # noqa: N802
        return "<vpcSet><item><vpcId>vpc-1</vpcId></item></vpcSet>"

    def CreateSecurityGroup(self, request: dict[str, str]) -> str:  # noqa: N802
        self.groups.append({"id": "sg-1", "tags": self.tags(request)})
        return "<groupId>sg-1</groupId>"

    def AuthorizeSecurityGroupIngress(self, request: dict[str, str]) -> str:  # noqa: N802
        self.rules.append(request)
        return "<return>true</return>"

    def DeleteSecurityGroup(self, request: dict[str, str]) -> str:  # noqa: N802
        self.groups = []
        return "<return>true</return>"

    def DescribeSecurityGroups(self, request: dict[str, str]) -> str:  # noqa: N802
        found = "".join(f"<item><groupId>{g['id']}</groupId></item>" for g in self.mine(self.groups, request))
        return f"<securityGroupInfo>{found}</securityGroupInfo>"

    def TerminateInstances(self, request: dict[str, str]) -> str:  # noqa: N802
        self.end([value for key, value in request.items() if key.startswith("InstanceId")])
        return "<instancesSet/>"

    def CancelSpotInstanceRequests(self, request: dict[str, str]) -> str:  # noqa: N802
        self.requests = []
        return "<spotInstanceRequestSet/>"

    def DescribeInstances(self, request: dict[str, str]) -> str:  # noqa: N802
        items = ""
        for m in self.mine(self.machines, request):
            tags = "".join(f"<item><key>{k}</key><value>{v}</value></item>" for k, v in m["tags"].items())
            items += (
                f"<item><instanceId>{m['id']}</instanceId><instanceState><name>{m['state']}</name></instanceState>"
                f"<reason>{m['reason']}</reason><instanceType>{m['type']}</instanceType>"
                f"<launchTime>{m['launched']}</launchTime><tagSet>{tags}</tagSet></item>"
            )
        return f"<reservationSet><item><instancesSet>{items}</instancesSet></item></reservationSet>"

    def DescribeVolumes(self, request: dict[str, str]) -> str:  # noqa: N802
        items = "".join(
            f"<item><volumeId>{v['id']}</volumeId><size>{v['size']}</size><status>{v['state']}</status></item>"
            for v in self.mine(self.volumes, request)
        )
        return f"<volumeSet>{items}</volumeSet>"

    def DescribeSpotInstanceRequests(self, request: dict[str, str]) -> str:  # noqa: N802
        items = "".join(
            f"<item><spotInstanceRequestId>{r['id']}</spotInstanceRequestId></item>"
            for r in self.mine(self.requests, request)
        )
        return f"<spotInstanceRequestSet>{items}</spotInstanceRequestSet>"

    def RayUp(self, request: dict[str, str]) -> str:  # noqa: N802
        """What our ``ray`` program asks for: the machines of a configuration."""
        made = json.loads(request["Config"])
        for role, node in made["available_node_types"].items():
            for i in range(node.get("min_workers", 1)):
                machine, id_ = node["node_config"], f"i-{role}{i}"
                tags = {
                    s["ResourceType"]: {t["Key"]: t["Value"] for t in s["Tags"]} for s in machine["TagSpecifications"]
                }
                launched = (datetime.now(UTC) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
                self.machines.append({"id": id_, "state": "running", "reason": "", "type": machine["InstanceType"],
                                      "launched": launched, "tags": tags["instance"]})  # fmt: skip
                self.volumes.append({"id": f"vol-{role}{i}", "size": 100, "state": "in-use", "tags": tags["volume"]})
                if spot := tags.get("spot-instances-request"):
                    self.requests.append({"id": f"sir-{role}{i}", "tags": spot})
        return ""

    def RayDown(self, request: dict[str, str]) -> str:  # noqa: N802
        self.end([m["id"] for m in self.machines])
        return ""

    def end(self, ids: list[str]) -> None:
        if self.stuck:
            return
        for m in self.machines:
            if m["id"] in ids and m["state"] != "terminated":
                told = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
                m.update(state="terminated", reason=f"User initiated ({told} GMT)")
                self.volumes = [v for v in self.volumes if v["id"] != m["id"].replace("i-", "vol-")]
                self.requests = [r for r in self.requests if r["id"] != m["id"].replace("i-", "sir-")]

    @staticmethod
    def mine(things: list[dict[str, Any]], request: dict[str, str]) -> list[dict[str, Any]]:
        assert request["Filter.1.Name"] == "tag:harness-cluster"
        states = {value for key, value in request.items() if key.startswith("Filter.2.Value")}
        mine = [thing for thing in things if thing["tags"].get("harness-cluster") == request["Filter.1.Value.1"]]
        return [thing for thing in mine if not states or thing.get("state", "open") in states]

    @staticmethod
    def tags(request: dict[str, str]) -> dict[str, str]:
        prefix = "TagSpecification.1.Tag."
        keys = {k: v for k, v in request.items() if k.startswith(prefix) and k.endswith(".Key")}
        return {key: request[name.replace(".Key", ".Value")] for name, key in keys.items()}


RAY = """#!{python}
import json, os, sys, urllib.parse, urllib.request, yaml
print("ray", *sys.argv[1:], flush=True)
if os.environ.get("FAKE_RAY_FAILS") in sys.argv: sys.exit("the cloud said no")
config = yaml.safe_load(open(sys.argv[-1]))
action = "RayUp" if sys.argv[1] == "up" else "RayDown"
assert "-y" in sys.argv
body = urllib.parse.urlencode({{"Action": action, "Config": json.dumps(config)}}).encode()
urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL_EC2"], body, timeout=10).read()
"""


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAws]:
    fake = FakeAws()
    for service in ("EC2", "SSM", "STS"):
        monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", fake.url)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(RAY.format(python=sys.executable))
    ray.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ray.parent}:{os.environ['PATH']}")
    aws_machines.client.cache_clear()
    monkeypatch.setattr(rent, "POLL_S", 0.0)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def run(*args: str) -> Result:
    return CliRunner().invoke(verbs, args, standalone_mode=False)


UP = ("up", "--tier", SPOT, "--nodes", "2", "--name", "test", "--ssh-from", "203.0.113.7")


def test_up_status_down(aws: FakeAws, tmp_path: Path) -> None:
    up = run(*UP, "--yes")
    assert up.return_value == 0, (up.output, up.exception)
    assert up.stdout == "test\n"
    assert up.stderr.index("USD/h") < up.stderr.index("ray up"), "the price comes before the bill begins"
    assert "1.12 USD/h = 2 x 0.4444 + 0.23184; at most 8.97 USD in the 8 h" in up.stderr
    assert "us-east-1; spore-host" in up.stderr, "the head's price is another region's, and that is said"
    assert [m["type"] for m in aws.machines] == ["m7a.xlarge", "g6.xlarge", "g6.xlarge"]
    (rule,) = aws.rules
    assert rule["IpPermissions.1.IpRanges.1.CidrIp"] == "203.0.113.7/32"
    assert rule["IpPermissions.1.FromPort"] == rule["IpPermissions.1.ToPort"] == "22"
    assert rule["IpPermissions.2.Groups.1.GroupId"] == "sg-1"
    assert not any(key.startswith("IpPermissions.3") for key in rule)
    assert aws.groups[0]["tags"]["harness-cluster"] == "test"
    folder = tmp_path / "state" / "harness" / "clusters" / "test"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made = yaml.safe_load((folder / "cluster.yaml").read_text())
    types = made["available_node_types"]
    assert {types[role]["node_config"]["ImageId"] for role in types} == {"ami-cpu", "ami-gpu"}
    assert types["worker"]["node_config"]["SecurityGroupIds"] == ["sg-1"]
    again = run(*UP, "--yes")
    assert isinstance(again.exception, UsageError)
    assert "already" in str(again.exception)

    state = json.loads((folder / "state.json").read_text())
    state["created"] = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    (folder / "state.json").write_text(json.dumps(state))
    (row,) = json.loads(run("status", "--format", "json").stdout)["clusters"]
    assert (row["name"], row["running"], row["nodes"]) == ("test", 2, 2)
    assert row["usd_so_far"] == pytest.approx(2 * 0.4444 + 0.23184, abs=0.03)
    assert "test" in run("status").stdout

    down = run("down")
    assert down.return_value == 0, (down.output, down.exception)
    assert "nothing is left (tag harness-cluster=test, region us-west-2, account 123456789012" in down.stderr
    assert "it cost at most 1.12 USD at 1.12 USD/h (prices read 2026-09-08 and" in down.stderr
    assert not folder.exists()
    assert json.loads(run("status", "--format", "json").stdout)["clusters"] == []
    assert isinstance(run("down").exception, UsageError)


def test_dry_run_rents_nothing(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    dry = run("up", "--tier", ON_DEMAND, "--nodes", "4", "--max-hours", "3", "--dry-run")
    assert dry.return_value == 0
    made = yaml.safe_load(dry.stdout)
    assert made["available_node_types"]["worker"]["min_workers"] == 4
    tier, head = get_tier(ON_DEMAND), get_tier(CPU)
    usd = 4 * tier.usd_per_hour + head.usd_per_hour
    assert f"{usd:,.2f} USD/h" in dry.stderr
    assert f"{3 * usd:,.2f} USD in the 3 h" in dry.stderr
    assert tier.source in dry.stderr
    assert aws.calls == []
    assert not rent.folder().exists()


def test_nothing_is_rented_without_a_yes(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run(*UP)
    assert isinstance(asked.exception, UsageError)
    assert "--yes" in str(asked.exception)
    assert "USD/h" in asked.stderr
    assert not aws.machines and not aws.groups
    assert rent.known_clusters() == []
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    answered = CliRunner().invoke(verbs, [*UP], standalone_mode=False, input="n\n")
    assert answered.return_value == 1
    assert "account 123456789012" in answered.output
    assert not aws.machines and not aws.groups
    assert rent.known_clusters() == []


def test_other_clouds_are_refused_plainly(aws: FakeAws) -> None:
    name = next(t.name for t in list_tiers() if t.provider == "gcp")
    refused = run("up", "--tier", name, "--yes")
    assert isinstance(refused.exception, UsageError)
    assert "ray start" in str(refused.exception) and "cluster/README.md" in str(refused.exception)
    assert aws.calls == []


def test_a_failed_ray_up_leaves_a_way_to_end_it(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_RAY_FAILS", "up")
    failed = run(*UP, "--yes")
    assert isinstance(failed.exception, HarnessError)
    assert "the cloud said no" in str(failed.exception)
    assert "harness cluster down test" in failed.stderr
    assert aws.groups
    monkeypatch.delenv("FAKE_RAY_FAILS")
    assert run("down", "test").return_value == 0
    assert not aws.groups


def test_too_few_workers_show_in_the_status(aws: FakeAws) -> None:
    aws.RayUp = lambda request: (FakeAws.RayUp(aws, request), aws.machines.pop())[0]  # type: ignore[method-assign]
    assert run(*UP, "--yes").return_value == 0
    (row,) = json.loads(run("status", "--format", "json").stdout)["clusters"]
    assert (row["running"], row["nodes"]) == (1, 2)


def test_machines_that_ray_down_leaves_are_ended(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*UP, "--yes").return_value == 0
    monkeypatch.setenv("FAKE_RAY_FAILS", "down")
    down = run("down")
    assert down.return_value == 0, (down.output, down.exception)
    assert "ended without it" in down.stderr
    assert all(m["state"] == "terminated" for m in aws.machines)


def test_leftovers_are_listed_and_are_a_failure(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*UP, "--yes").return_value == 0
    aws.volumes.append({"id": "vol-lost", "size": 500, "state": "available", "tags": aws.volumes[0]["tags"]})
    monkeypatch.setattr(rent, "GONE_S", 0.0)
    left = run("down")
    assert left.return_value == 1
    assert "LEFT: disk vol-lost" in left.stderr
    assert "nothing is left" not in left.stderr
    assert len(rent.known_clusters()) == 1, "what still costs money is not forgotten"
    aws.volumes = []
    assert run("down").return_value == 0


def test_machines_that_do_not_end_are_a_failure(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*UP, "--yes").return_value == 0
    aws.stuck = True
    monkeypatch.setattr(rent, "GONE_S", 0.0)
    left = run("down")
    assert left.return_value == 1
    assert left.stderr.count("LEFT: machine") == 3
    assert "region us-west-2, account 123456789012" in left.stderr


def test_what_starts_late_or_could_start_is_ended_too(aws: FakeAws) -> None:
    assert run(*UP, "--yes").return_value == 0
    tags = aws.machines[0]["tags"]
    aws.requests.append({"id": "sir-open", "tags": tags})
    aws.volumes.append({"id": "vol-going", "size": 100, "state": "deleting", "tags": tags})
    aws.calls.clear()

    def describe(request: dict[str, str]) -> str:
        if aws.calls.count("DescribeInstances") == 2:  # its order to start was on its way when the head was ended
            aws.machines.append({**aws.machines[0], "id": "i-late", "state": "running", "reason": ""})
        return FakeAws.DescribeInstances(aws, request)

    aws.DescribeInstances = describe  # type: ignore[method-assign]
    down = run("down")
    assert down.return_value == 0, (down.output, down.exception)
    assert aws.calls.count("CancelSpotInstanceRequests") == 1
    assert {m["state"] for m in aws.machines if m["id"] == "i-late"} == {"terminated"}


def test_another_account_proves_nothing(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*UP, "--yes").return_value == 0
    aws.machines, aws.volumes, aws.requests, aws.groups = [], [], [], []  # to another account nothing of it is there
    monkeypatch.setattr(aws, "GetCallerIdentity", lambda request: FakeAws.GetCallerIdentity(aws, request).replace(
        "123456789012", "999999999999"))  # fmt: skip
    for verb in ("down", "status"):
        wrong = run(verb, "test")
        assert isinstance(wrong.exception, HarnessError)
        assert "account 123456789012" in str(wrong.exception) and "999999999999" in str(wrong.exception)
    (known,) = rent.known_clusters()
    assert known.name == "test", "it still costs money"


def test_a_proof_that_cannot_be_had_is_no_proof(aws: FakeAws) -> None:
    assert run(*UP, "--yes").return_value == 0
    aws.denied.add("DescribeVolumes")
    down = run("down")
    assert isinstance(down.exception, HarnessError)
    assert "may not do this" in str(down.exception)
    assert len(rent.known_clusters()) == 1


def test_what_aws_says_is_explained(aws: FakeAws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    aws.denied.add("GetCallerIdentity")
    with pytest.raises(HarnessError, match="may not do this"):
        Aws().account(make())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    aws_machines.client.cache_clear()
    with pytest.raises(HarnessError, match="no usable AWS credentials"):
        Aws().account(make())
    (tmp_path / "state" / "harness" / "clusters" / "torn").mkdir(parents=True)
    (tmp_path / "state" / "harness" / "clusters" / "torn" / "state.json").write_text('{"name": "torn"')
    with pytest.raises(HarnessError, match="harness-cluster=torn"):
        rent.known_clusters()
