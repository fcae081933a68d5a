"""Replicas of one model on one tier, started through Ray: an actor on each of their hosts owns the process groups.

Local Ray is started when RAY_ADDRESS names no cluster; either way the code is the same. With accelerators every replica
has an actor of its own, to which Ray gives them. Kill order: the process groups first, then the actor; killing the
actor alone would leave its servers to their guards. The GPU path is complete but has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from harness.cluster.catalogue.models import Model
from harness.cluster.deploy.load_workers import Child, Job, Launch, start_here
from harness.cluster.deploy.placement import (
    ACTOR_CPUS,
    NICENESS,
    Node,
    bundles,
    choose_load_nodes,
    choose_nodes,
    replica_need,
    shortage,
)
from harness.cluster.deploy.ray_session import alive_nodes, connect, disconnect, head_gone, last_line
from harness.cluster.deploy.remote import RemoteHost, RemoteWorker
from harness.cluster.deploy.servers import TRIES, Failed, Reserved, ServersActor, Started
from harness.cluster.deploy.supervisor import CHECK_S, PartOwner, ServerHost, Supervisor
from harness.cluster.engines.protocol import WHOLE, Engine, Part, State
from harness.cluster.engines.vllm import VllmEngine
from harness.cluster.process.process import GRACE_S, Process
from harness.cluster.process.registry import reservations
from harness.errors import ServerError, UsageError
from harness.record.manifest import OnReplicaDeath, Replica, Restart, RunDir, Tier
from harness.record.samples import HostMetrics, host_file
from harness.server import probe

import ray  # isort: skip  # after harness.cluster.deploy.ray_session, which sets what Ray reads when it is imported
from ray.exceptions import RayError  # isort: skip
from ray.util.placement_group import placement_group, remove_placement_group  # isort: skip
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # isort: skip

PLACE_S = 300.0
"""Hardware that is there but taken by other jobs is waited for this long."""
ACTOR_S = 120.0
"""An actor that is placed and not up by then will not come."""
READY_S = 600.0
WEIGHTS_S = 4 * 3600.0
"""A host may have to download the weights first."""


class Deployment:
    """Model servers for the length of a ``with`` block.

    ``replicas``, ``engine``, ``evidence``, ``engine_version``, ``engine_args``, ``model_facts``, ``shares_host`` and
    ``shared_cores`` describe them once they are ready. Raises `UsageError` for a tier the engine does not fit; entering
    raises `ServerError` when one of them does not come up, after all were ended again. It may be held open over many
    runs; `check` watches the servers while one lasts.
    """

    def __init__(
        self,
        *,
        model: Model,
        weights: Path,
        tier: Tier,
        replicas: int,
        run_dir: Path,
        api_key: str,
        say: Callable[[str], None] = lambda text: None,
        engine: Engine | None = None,
        ready_s: float = READY_S,
        on_replica_death: OnReplicaDeath = "fail",
    ) -> None:
        if replicas < 1:
            raise UsageError(f"--replicas {replicas}: at least one server is needed")
        self._engine: Engine = engine or VllmEngine(model=model, tier=tier, weights=weights)
        if misfit := self._engine.misfit(tier):
            raise UsageError(misfit)
        self._tier, self._run_dir, self._say, self._ready_s = tier, run_dir, say, ready_s
        self._joined = False
        """This deployment connected to Ray, so it disconnects."""
        self._ray: Process | None = None
        """Ray itself, when it was started here."""
        self._groups: list[Any] = []
        self._nodes: list[Node] = []
        self._load_nodes: list[Node] = []
        self._spare_cpus: list[int] | None = None
        self._workers: list[Child] = []
        self._hosts: list[RemoteHost] = []
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        """Of this process, and so of the load workers: no server of the run is to give way to them."""
        self.api_key = api_key
        self.replicas = [Replica(index=i, base_url="", log=str(run_dir / f"server-{i}.log")) for i in range(replicas)]
        self.engine, self.evidence = self._engine.name, self._engine.evidence
        self.engine_args = self._engine.args
        self.engine_version: str | None = None
        self.model_facts = self._engine.facts()
        self.shares_host: bool | None = None
        """True when load workers run on the machine of a replica."""
        self.shared_cores: bool | None = None
        """True when load workers may run on processors that a replica runs on."""
        self._supervisor = Supervisor(self.replicas, say, restart=on_replica_death == "restart", ready_s=ready_s)

    def __enter__(self) -> Deployment:
        try:
            self._start()
        except BaseException:  # whatever it was, Ctrl-C included: leave nothing running
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # -- start --------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._joined = not ray.is_initialized()
        self._ray = connect(self._say)
        self._nodes = alive_nodes()
        need = replica_need(self._tier, hosts=self._engine.hosts, memory_gib=self._engine.memory_gib)
        if problem := shortage(self._nodes, need, len(self.replicas)):
            raise ServerError(f"{len(self.replicas)} x {self._tier.name}: {problem}")
        one = len(self.replicas) == 1
        self._say(f"starting {'a server' if one else f'{len(self.replicas)} servers'}: {self._engine.served_model}, "
                  f"{self.engine}, {self._tier.name}")  # fmt: skip
        # On accelerators Ray chooses the node of each replica; replicas on processors of one node share an actor.
        together: list[tuple[Node | None, list[int]]] = [(None, [i]) for i in range(len(self.replicas))]
        if not self._tier.accelerator_count:
            on_node: dict[str, tuple[Node | None, list[int]]] = {}
            for i, chosen in enumerate(choose_nodes(self._nodes, need, len(self.replicas), self._tier.vcpu)):
                on_node.setdefault(chosen.node_id, (chosen, []))[1].append(i)
            together = list(on_node.values())
        for node, members in together:
            shape, strategy = bundles(need, node, len(members))
            self._groups.append(placement_group(shape, strategy=strategy))
        self._wait_placed([members[0] for _, members in together])
        for (_, members), group in zip(together, self._groups, strict=True):
            for part in range(need.hosts):
                self._own(members, group, part)
        hosts = self._supervisor.hosts
        nodes = self._gather([host.actor.node_id.remote() for host in hosts], ACTOR_S, "its Ray actor did not start")
        for host, node_id in zip(hosts, nodes, strict=True):
            host.node = node_id
        self._gather([host.actor.prepare.remote() for host in hosts], WEIGHTS_S, "its weights took too long")
        vcpu = None if self._tier.accelerator_count else self._tier.vcpu
        local_gpus = bool(self._tier.accelerator_count) and self._ray is not None
        reserved = self._gather([host.actor.reserve.remote(vcpu, local_gpus) for host in hosts], ACTOR_S, "no answer")
        for owner, server in zip(self._supervisor.owners, self._start_servers(), strict=True):
            if owner.part == 0:
                replica = self.replicas[owner.replica]
                replica.base_url, replica.ready_s, replica.nice = server.base_url, server.ready_s, server.nice
                self._say(f"replica {owner.replica} ready after {server.ready_s:.0f} s at {server.base_url}")
                if server.nice is not None and server.nice > self._nice:
                    self._say(f"warning: replica {owner.replica} runs at nice {server.nice}, so other work of its host "
                              f"goes first: start Ray there with {NICENESS}=0 in its environment")  # fmt: skip
        for _ in range(2):  # their logs come home before there is load; the first question may be an old one
            self._supervisor.listen(CHECK_S)
        self.engine_version = probe.engine_version(self.replicas[0].base_url, self.api_key)
        self._note_cpus(reserved)
        self._place_load(reserved)

    def _wait_placed(self, first: list[int]) -> None:
        """Until Ray has reserved all hardware. It exists: `shortage` was asked; it may be taken."""
        deadline = time.monotonic() + PLACE_S
        told = False
        for index, group in zip(first, self._groups, strict=True):
            while not group.wait(1):
                if not told:
                    told = True
                    self._say(f"replica {index} is queued: other jobs of the cluster hold the hardware it needs")
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"replica {index}: the cluster has {self._tier.name}, but other jobs held it for "
                        f"{PLACE_S:.0f} s; see `ray status`, or run again when they are done"
                    )

    def _own(self, members: list[int], group: Any, part: int) -> None:
        """An actor on one bundle of a placement group, for these replicas (of them: for this part)."""
        actor = ray.remote(
            num_cpus=ACTOR_CPUS, num_gpus=self._tier.accelerator_count or None,
            max_concurrency=len(members) + 8,  # every start waits in a thread of its own
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=part),
        )(ServersActor)  # fmt: skip
        name, file = (f" part {part}", f"-part-{part}") if part else ("", "")
        servers = [(f"replica {k}{name}", str(self._run_dir / f"server-{k}{file}.log")) for k in members]
        address = "127.0.0.1" if len(self._nodes) == 1 else ""
        host = ServerHost(actor.remote(self._engine, servers, self.api_key, address, self._nice))
        host.owners = [PartOwner(host, i, index, part, Path(servers[i][1])) for i, index in enumerate(members)]
        self._supervisor.hosts.append(host)
        self._supervisor.owners += host.owners

    def _start_servers(self) -> list[Started]:
        """Start all servers at once; what each owner has. The parts of one meet at a port: another one on a clash."""
        owners = self._supervisor.owners
        started: list[Started | Failed] = [Failed("", clash=True) for _ in owners]
        for attempt in range(1, TRIES + 1):
            again = {o.replica for o, found in zip(owners, started, strict=True) if isinstance(found, Failed)}
            where = [i for i, owner in enumerate(owners) if owner.replica in again]
            if attempt > 1:
                for index in sorted(again):
                    self._say(f"replica {index}: a port its parts meet at was taken meanwhile; trying another one")
                ends = [owners[i].host.actor.end.remote(owners[i].place) for i in where]
                self._gather(ends, ACTOR_S, "did not end", of=where)
            refs, meeting = [], ("", 0)
            for owner in (owners[i] for i in where):
                part = WHOLE
                if self._engine.hosts > 1:
                    if owner.part == 0:
                        (meeting,) = self._gather([owner.host.actor.meeting_point.remote()], ACTOR_S, "no answer")
                    part = Part(rank=owner.part, hosts=self._engine.hosts, master=meeting[0], master_port=meeting[1])
                refs.append(owner.host.actor.start.remote(owner.place, self._ready_s, part))
            found = self._gather(refs, self._ready_s + 60, "no answer", of=where, clash_ok=attempt < TRIES)
            for i, answer in zip(where, found, strict=True):
                started[i] = answer
            if all(isinstance(answer, Started) for answer in started):
                break
        return [answer for answer in started if isinstance(answer, Started)]

    def _gather(
        self, refs: list[Any], timeout_s: float, late: str, *, of: list[int] | None = None, clash_ok: bool = False
    ) -> list[Any]:
        """Results of one call to every host, or to owners, in order; raises `ServerError` at the first failure."""
        watch = self._supervisor
        asked = [host.owners[0] for host in watch.hosts] if of is None else [watch.owners[i] for i in of]
        replica = dict(zip(refs, (owner.replica for owner in asked), strict=False))
        deadline = time.monotonic() + timeout_s
        results: dict[Any, Any] = {}
        while waiting := [ref for ref in refs if ref not in results]:
            done, _ = ray.wait(waiting, num_returns=1, timeout=0.5)
            watch.listen()
            for ref in done:
                try:
                    answer = results[ref] = ray.get(ref)
                except RayError as e:
                    raise ServerError(f"replica {replica[ref]}: its Ray actor failed: {last_line(e)}") from e
                if isinstance(answer, Failed) and not (clash_ok and answer.clash):
                    raise ServerError(answer.message)
            if not done:
                if time.monotonic() > deadline:
                    raise ServerError(f"replica {replica[waiting[0]]}: {late} (waited {timeout_s:.0f} s)")
                for host in watch.hosts:
                    if host.lost:
                        raise ServerError(f"replica {host.owners[0].replica}: {host.lost}")
        return [results[ref] for ref in refs]

    def _note_cpus(self, reserved: list[Reserved]) -> None:
        """Write down how many processors a replica has, and who else is on them."""
        if counts := {len(cpus) for one in reserved for cpus in one.cpus if cpus is not None}:
            each = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
            self.model_facts["cpus_per_replica"] = f"{each} of the tier's {self._tier.vcpu}"
        if others := "; ".join(one.shared_with for one in reserved if one.shared_with):
            self.model_facts["cpus_shared_with"] = "servers of another run"
            self._say(f"warning: no processor is free, so servers share theirs and look slower than they are: {others}")

    def _place_load(self, reserved: list[Reserved]) -> None:
        """Choose where load workers go: nodes without a replica, else processors without one, else beside them."""
        servers = [host.node for host in self._supervisor.hosts]
        self._load_nodes = choose_load_nodes(self._nodes, servers)
        self.shares_host = self.shared_cores = any(node.node_id in servers for node in self._load_nodes)
        taken = [cpus for one in reserved for cpus in one.cpus]
        if self.shares_host and len(self._nodes) == 1 and all(cpus is not None for cpus in taken):
            held = {cpu for cpus in taken for cpu in cpus or ()} | {cpu for one in reservations() for cpu in one.cpus}
            if spare := sorted(os.sched_getaffinity(0) - held):
                self._spare_cpus, self.shared_cores = spare, any(one.shared_with for one in reserved)
        if self.shared_cores:
            self._say("warning: load workers share processors with a server, which makes it look slower than it is")

    # -- while it runs ------------------------------------------------------------------------------------------------

    @property
    def states(self) -> list[State]:
        """Of each replica: queued, starting, loading, compiling or ready (`cluster.engines.protocol.State`)."""
        return [owner.state for owner in self._supervisor.owners if owner.part == 0]

    @property
    def restarts(self) -> list[Restart]:
        """Replicas that died and were started again, so far; always the same list."""
        return self._supervisor.restarts

    @property
    def restarting(self) -> bool:
        """A dead server is being started again."""
        return self._supervisor.restarting

    def check(self) -> dict[int, str]:
        """Replicas that have ended, index -> how (`Supervisor.check`). Waits a second at most."""
        for host in self._hosts:
            host.fetch()
        return self._supervisor.check()

    @property
    def launch(self) -> Launch | None:
        """How to start load workers; null when they are best ordinary children of this process."""
        if self._spare_cpus is not None:
            return partial(start_here, cpus=self._spare_cpus)
        return None if all(node.here for node in self._load_nodes) else self._launch

    def _launch(self, job: Job) -> Child:
        """Start a load worker on the next load node."""
        node = self._load_nodes[len(self._workers) % len(self._load_nodes)]
        if node.here:
            self._workers.append(start_here(job))
        else:
            self._workers.append(worker := RemoteWorker(node, job))
            worker.begin()
        return self._workers[-1]

    @contextmanager
    def sample_hosts(self, run: RunDir, start_unix_ns: int) -> Iterator[None]:
        """Counters of this host and of every host with a replica or load workers, and the processor time of every
        server, each second, beside the results.
        """
        used = {host.node for host in self._supervisor.hosts} | {node.node_id for node in self._load_nodes}
        others = [node for node in self._nodes if node.node_id in used and not node.here]
        self._hosts = remote = [RemoteHost(node, host_file(run.path, node.address)) for node in others]
        here = self._nodes[0].address if len(self._nodes) > 1 else "local"
        with (
            HostMetrics(host_file(run.path, here), start_unix_ns) as metrics,
            self._supervisor.sampling(run, start_unix_ns),
        ):
            try:
                for host in remote:
                    host.begin(start_unix_ns)
                yield
            finally:
                self._hosts = []
                for host in remote:
                    host.end()
        if metrics.trouble:
            self._say(f"host metrics: {metrics.trouble}")

    # -- end ----------------------------------------------------------------------------------------------------------

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End every server and worker, then Ray if it was started here. Idempotent; a lost host is not waited for."""
        workers, self._workers = self._workers, []
        groups, self._groups = self._groups, []
        head, self._ray = self._ray, None
        try:
            # When our own Ray is gone, what it ran is, too: asking it would block until Ray ends this very process.
            gone = head is not None and head.poll() is not None
            for worker in workers:
                if isinstance(worker, Process) or (ray.is_initialized() and not gone):
                    worker.stop(grace_s)
            if ray.is_initialized() and not gone:
                self._supervisor.stop(grace_s)  # hosts answer without their cluster's head, too
                for group in groups if not head_gone() else ():
                    with contextlib.suppress(RayError):
                        remove_placement_group(group)
        finally:
            if self._joined:
                self._joined = False
                disconnect(head)
