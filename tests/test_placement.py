"""Where replicas and load workers go, and what is said when they can go nowhere. No Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster.catalogue.tiers import CATALOGUE, read_tiers
from harness.cluster.deploy.placement import (
    GIB,
    Node,
    bundles,
    choose_cpus,
    choose_load_nodes,
    choose_nodes,
    replica_need,
    room,
    shortage,
)

TIERS = read_tiers(CATALOGUE)
CPU_TIER, P5 = TIERS["aws-m7a.large"], TIERS["aws-p5.48xlarge"]


def node(name: str, *, here: bool = False, memory_gib: float = 1500.0, **resources: float) -> Node:
    plain = {key.replace("accelerator_", "accelerator_type:"): value for key, value in resources.items()}
    return Node(node_id=name, address=name, here=here, resources={"memory": memory_gib * GIB, **plain})


H100 = node("h100", CPU=192.0, GPU=8.0, accelerator_H100=1.0)
HALF = node("half", CPU=96.0, GPU=4.0, accelerator_H100=1.0)
A100 = node("a100", CPU=96.0, GPU=8.0, accelerator_A100=1.0)
PLAIN = node("plain", CPU=4.0)


def test_a_replica_takes_the_tiers_hardware_of_one_node() -> None:
    need = replica_need(P5)
    assert need.bundle == {"CPU": 0.01, "GPU": 8.0, "accelerator_type:H100": 0.001}
    assert need.floor == {"memory": 1024 * GIB}, "half of the instance's memory"
    assert bundles(need, None) == ([dict(need.bundle)], "STRICT_PACK"), "tensor parallel stays inside a node"
    assert [room(n, need) for n in (H100, HALF, A100, PLAIN)] == [1, 0, 0, 0]
    one_gpu = replica_need(TIERS["aws-g6.xlarge"])
    eight = node("l4s", CPU=192.0, GPU=8.0, accelerator_L4=1.0)
    assert room(eight, one_gpu) == 8, "several replicas on one node"


BOARDS = {
    "A10": "NVIDIA A10", "A10G": "NVIDIA A10G", "A100": "NVIDIA A100-SXM4-80GB", "B200": "NVIDIA B200",
    "GH200": "NVIDIA GH200 480GB", "H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200", "L4": "NVIDIA L4",
    "L40S": "NVIDIA L40S", "RTX-PRO-6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
}  # fmt: skip
"""What the driver calls an accelerator of a tier."""


def test_tiers_name_accelerators_as_ray_makes_it_of_the_drivers_name() -> None:
    ray = pytest.importorskip("ray._private.accelerators.nvidia_gpu").NvidiaGPUAcceleratorManager
    assert set(BOARDS) == {tier.accelerator for tier in TIERS.values() if tier.accelerator}
    assert {name: ray._gpu_name_to_accelerator_type(board) for name, board in BOARDS.items()} == {
        name: name for name in BOARDS
    }
    assert ray._gpu_name_to_accelerator_type("NVIDIA H100 PCIe") == "H100"
    assert ray._gpu_name_to_accelerator_type("NVIDIA A100-PCIE-40GB") == "A100"


def test_a_replica_over_several_nodes_takes_one_bundle_of_each() -> None:
    need = replica_need(P5, hosts=2)
    shape, strategy = bundles(need, None)
    assert (len(shape), strategy) == (2, "STRICT_SPREAD")
    assert shortage([H100, H100], need, 1) is None
    problem = shortage([H100, HALF], need, 1)
    assert problem is not None
    assert "room for 0" in problem
    assert "on each of 2 nodes" in problem
    assert shortage([H100, H100, H100], need, 2) is not None, "three nodes carry one pair"


def test_a_cluster_too_small_is_told_node_by_node_what_is_missing() -> None:
    need = replica_need(P5)
    assert shortage([H100, H100], need, 2) is None
    problem = shortage(
        [H100, HALF, A100, PLAIN, node("small", memory_gib=10, GPU=8, CPU=8, accelerator_H100=1)], need, 2
    )
    assert problem is not None
    lines = problem.splitlines()
    assert "room for 1; each needs 1024.0 GiB of memory, 8 GPU, H100 on one node" in lines[0]
    assert "h100: " in lines[1]
    assert lines[1].endswith("room for 1")
    assert lines[2].endswith("4 GPU missing")
    assert lines[3].endswith("no H100")
    assert "A100" in lines[3], "what is there"
    assert lines[4].endswith("8 GPU missing, no H100")
    assert lines[5].endswith("1014.0 GiB of memory missing")
    assert "RAY_ADDRESS" in lines[6]
    assert "no node is alive" in (shortage([], need, 1) or "")


def test_memory_of_cpu_replicas_is_reserved_when_it_is_known() -> None:
    assert shortage([node("n", CPU=1)], replica_need(CPU_TIER), 8) is None, "a CPU actor asks for next to nothing"
    need = replica_need(CPU_TIER, memory_gib=4.0)
    assert shortage([node("n", CPU=8, memory_gib=9)], need, 2) is None
    assert "room for 2; each needs 4.0 GiB of memory" in (shortage([node("n", CPU=8, memory_gib=9)], need, 3) or "")


def test_cpu_replicas_fill_other_nodes_before_the_drivers() -> None:
    nodes = [node("me", here=True, CPU=4.0), node("a", CPU=4.0), node("b", CPU=2.0)]
    need = replica_need(CPU_TIER)

    def names(count: int) -> list[str]:
        return [n.node_id for n in choose_nodes(nodes, need, count, 2)]

    assert names(1) == ["a"]
    assert sorted(names(3)) == ["a", "a", "b"]
    assert sorted(names(5)) == ["a", "a", "b", "me", "me"]
    assert choose_load_nodes(nodes, ["a", "b"]) == [nodes[0]]
    assert choose_load_nodes(nodes, ["a", "b", "me"]) == nodes, "beside servers when there is nowhere else"
    (first, *_), strategy = bundles(need, nodes[1])
    assert first["node:a"] > 0
    assert strategy == "STRICT_PACK"


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 16))
def test_cpu_replicas_share_processors_only_when_they_must(cores: list[int], replicas: int, vcpu: int) -> None:
    nodes = [node(str(i), here=i == 0, CPU=float(c)) for i, c in enumerate(cores)]
    assert shortage(nodes, replica_need(CPU_TIER), replicas) is None
    chosen = [n.node_id for n in choose_nodes(nodes, replica_need(CPU_TIER), replicas, vcpu)]
    assert len(chosen) == replicas
    slots = sum(c // vcpu for c in cores)
    if replicas <= slots:
        assert all(chosen.count(n.node_id) * vcpu <= n.resources["CPU"] for n in nodes)


@given(st.integers(1, 256), st.integers(1, 16), st.integers(1, 16))
def test_cpus_are_the_tiers_and_shared_only_when_too_few(host: int, vcpu: int, count: int) -> None:
    given_out = [choose_cpus(range(host), vcpu, rank, count) for rank in range(count)]
    assert all(1 <= len(cpus) <= vcpu for cpus in given_out)
    flat = [cpu for cpus in given_out for cpu in cpus]
    assert set(flat) <= set(range(host))
    if host >= count:
        assert len(set(flat)) == len(flat), "no two replicas on one processor"
    if host >= count * vcpu:
        assert all(len(cpus) == vcpu for cpus in given_out)
