"""The manifests for Kubernetes: well formed, without privileges, and what they start is what the harness can do.

Kinds of Kubernetes are held against its own schemas, which kubernetes-validate brings. KubeRay's are not to be had as a
package: of a RayCluster the pods are held against Kubernetes' schema, the rest against the fields of its API reference.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, cast

import click
import kubernetes_validate
import pytest
import yaml
from conftest import StartServer, harness
from packaging.specifiers import SpecifierSet

from harness.cli import cli
from harness.cluster.deploy.placement import NICENESS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "cluster" / "kubernetes"
VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest that is looked after by somebody, and the newest."""
Resource = dict[str, Any]


def resources(file: str) -> dict[str, Resource]:
    found = [one for one in yaml.safe_load_all((FOLDER / file).read_text()) if one is not None]
    by_kind = {one["kind"]: one for one in found}
    assert len(by_kind) == len(found)
    return by_kind


def pods(file: str) -> list[Resource]:
    """The templates of all pods that a file starts."""
    found: list[Resource] = []
    for one in resources(file).values():
        spec = one.get("spec", {})
        found += [group["template"] for group in (spec, spec.get("headGroupSpec", {})) if "template" in group]
        found += [group["template"] for group in spec.get("workerGroupSpecs", [])]
    return found


FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_kubernetes_takes_it(file: str, version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error."""
    for kind, one in resources(file).items():
        assert one["metadata"]["namespace"] == "harness"
        if kind != "RayCluster":
            kubernetes_validate.validate(one, version, strict=True)
    for template in pods(file):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_schemas_find_what_is_wrong() -> None:
    job = resources("client-job.yaml")["Job"]
    job["spec"]["template"]["spec"]["containers"][0]["securityContext"]["runAsNobody"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="runAsNobody"):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("file", FILES)
def test_pods_have_no_privileges_and_no_secret_stands_in_a_file(file: str) -> None:
    assert pods(file)
    for template in pods(file):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
            assert container["image"] == "IMAGE" and "command" not in container, "the image says what it runs"
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits == requests and int(limits["cpu"]) >= 2, "whole processors of its own"
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            for variable in container.get("env", []):
                secret = any(word in variable["name"] for word in ("KEY", "TOKEN", "SECRET"))
                assert secret == ("secretKeyRef" in variable.get("valueFrom", {})), variable["name"]


@pytest.mark.parametrize(("file", "writes"), [("client-job.yaml", "/work"), ("sweep-job.yaml", "/work")])
def test_a_job_is_tried_once_and_can_write_where_the_image_works(file: str, writes: str) -> None:
    spec = resources(file)["Job"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert mounts == {writes, "/tmp", "/cache"}, "the folders that the Dockerfile gives everybody"


def words(file: str) -> list[str]:
    (template,) = pods(file)
    return list(template["spec"]["containers"][0]["args"])


@pytest.mark.parametrize("file", ["client-job.yaml", "sweep-job.yaml"])
def test_verbs_and_options_of_a_job_exist(file: str) -> None:
    verb, *rest = words(file)
    command = cast(click.Group, cli).get_command(click.Context(cli), verb)
    assert command is not None
    command.make_parser(click.Context(command)).parse_args(rest)


def test_the_client_job_as_it_stands_is_a_load_test(fake_server: StartServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": 0.05 * k, "input_tokens": 20, "output_tokens": 8} for k in range(40)]
    trace.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    server = fake_server("--ttft", "0.01", "--itl", "0.01", "--model", "mistral-7b-instruct-v0.3")
    here = {"/trace/trace.jsonl": str(trace), "--out=/work/runs": f"--out={tmp_path / 'runs'}"}
    asked = [here.get(word, word) for word in words("client-job.yaml")]
    (address,) = [word for word in asked if word.startswith("--base-url=")]
    asked[asked.index(address)] = f"--base-url={server.url}"
    done = harness(*asked, "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["slo"]["met"] is True


def test_the_sweep_job_as_it_stands_is_a_plan_with_a_price(fake_server: StartServer, tmp_path: Path) -> None:
    text = resources("sweep-job.yaml")["ConfigMap"]["data"]["sweep.toml"]
    spec = tomllib.loads(text)
    (address,) = spec["base_url"][spec["tiers"][0]]
    server = fake_server("--model", spec["models"][0])
    trace = ROOT / "scenarios" / "traces" / "azure-conv-2023.csv"
    (tmp_path / "sweep.toml").write_text(text.replace(spec["trace"], str(trace)).replace(address, server.url))
    verb, file, *_ = words("sweep-job.yaml")
    assert file == "/sweep/sweep.toml"
    done = harness(verb, tmp_path / "sweep.toml", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "$" in done.stdout or "USD" in done.stdout


# --- a Ray cluster ---

RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Fields of ``ray.io/v1`` that are used. Source: KubeRay's API reference, 1.5."""


@pytest.fixture(scope="module")
def manifest() -> dict[str, Resource]:
    found = resources("kuberay.yaml")
    assert set(found) == {"RayCluster", "NetworkPolicy"}
    return found


def test_a_ray_cluster_has_kuberays_fields(manifest: dict[str, Resource]) -> None:
    cluster = manifest["RayCluster"]
    assert set(cluster) == {"apiVersion", "kind", "metadata", "spec"} and cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert set(spec) == RAY_CLUSTER and set(spec["headGroupSpec"]) == HEAD
    for group in spec["workerGroupSpecs"]:
        assert set(group) == WORKERS
        assert all(isinstance(group[name], int) for name in ("replicas", "minReplicas", "maxReplicas"))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "map[string]string"


def test_kuberay_cluster(manifest: dict[str, Resource]) -> None:
    spec = manifest["RayCluster"]["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert SpecifierSet(">=2.52").contains(spec["rayVersion"]), "before, Ray had no tokens"
    head, (worker,) = spec["headGroupSpec"]["template"], spec["workerGroupSpecs"]
    assert worker["minReplicas"] == worker["replicas"] <= worker["maxReplicas"]
    for template, gpus in ((head, 0), (worker["template"], 1)):
        (container,) = template["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert int(limits.get("nvidia.com/gpu", 0)) >= gpus and ("nvidia.com/gpu" in limits) == bool(gpus)
        assert {"name": NICENESS, "value": "0"} in container["env"], "servers do not give way to whatever else runs"
    shared = {v["name"]: v for v in worker["template"]["spec"]["volumes"]}["dshm"]["emptyDir"]
    assert shared["medium"] == "Memory" and "sizeLimit" in shared, "tensor parallelism talks through /dev/shm"
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_kuberay_network_policy_lets_only_the_cluster_in(manifest: dict[str, Resource]) -> None:
    policy, name = manifest["NetworkPolicy"]["spec"], manifest["RayCluster"]["metadata"]["name"]
    ours = {"matchLabels": {"ray.io/cluster": name}}
    assert policy["podSelector"] == ours
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        for peer in rule["from"]:
            assert peer == {"podSelector": ours} or "namespaceSelector" in peer
    assert manifest["NetworkPolicy"]["metadata"]["namespace"] == manifest["RayCluster"]["metadata"]["namespace"]
