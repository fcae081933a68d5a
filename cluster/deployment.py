"""Replicas of one model on one tier, started through Ray: one actor per replica, each owning one process group.

Local Ray is started when RAY_ADDRESS names no cluster; either way the code is the same. Kill order: the process group
first, then the actor; killing the actor alone would leave its server to the guard. The GPU path is complete but has not
run on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.actors import Failed, Look, ReplicaActor
from cluster.engine import Engine, Part
from cluster.job import Child, Job, Launch, start_here
from cluster.join import LOST_S, Question, alive_nodes, ask, connect, disconnect, last_line
from cluster.models import Model
from cluster.placement import (
    ACTOR_CPUS,
    Node,
    bundles,
    choose_load_nodes,
    choose_nodes,
    replica_need,
    shortage,
)
from cluster.process import GRACE_S, Process
from cluster.remote import RemoteHost, RemoteWorker
from cluster.vllm import VllmEngine
from harness import probe
from harness.errors import ServerError, UsageError
from harness.host_metrics import HostMetrics, host_file
from harness.run import Replica, Restart, RunDir, Tier, now_utc

import ray  # isort: skip  # after cluster.join, which sets what Ray reads when it is imported
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
CHECK_S = 1.0
"""`Deployment.check` waits this long for answers; late ones are taken the next time."""
LOG_FILE_NOTE = "(the rest of this log stayed on a host that was lost)\n"


@dataclass(slots=True)
class _Owner:
    """The actor of one part of a replica, as far as the driver knows."""

    actor: Any
    replica: int
    part: int
    log: Path
    node: str = ""
    state: str = "queued"
    offset: int = 0
    """Of the log, when it comes from another host."""
    ended: str | None = None
    question: Question | None = None

    def look(self) -> Any:
        """Ask for news, unless a question is open."""
        if self.question is None:
            self.question = Question(lambda: self.actor.look.remote(self.offset))
        return self.question.send()


class Deployment:
    """Model servers for the length of a ``with`` block.

    ``replicas``, ``engine``, ``engine_version``, ``engine_args``, ``model_facts``, ``shares_host`` and ``shared_cores``
    describe them once they are ready. Entering raises `ServerError` when one of them does not come up, after all were
    ended again. It may be held open over many runs; `check` watches the servers while one lasts.
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
        on_replica_death: str = "fail",
    ) -> None:
        if replicas < 1:
            raise UsageError(f"--replicas {replicas}: at least one server is needed")
        self._engine: Engine = engine or VllmEngine(model=model, tier=tier, weights=weights)
        self._tier, self._run_dir, self._say, self._ready_s = tier, run_dir, say, ready_s
        self._restarts_wanted = on_replica_death == "restart"
        self._joined = False
        """This deployment connected to Ray, so it disconnects."""
        self._ray: Process | None = None
        """Ray itself, when it was started here."""
        self._owners: list[_Owner] = []
        self._groups: list[Any] = []
        self._nodes: list[Node] = []
        self._load_nodes: list[Node] = []
        self._spare_cpus: list[int] | None = None
        self._workers: list[Child] = []
        self._hosts: list[RemoteHost] = []
        self._restarting: dict[int, tuple[Any, int, float]] = {}
        """Of a replica: the answer to come, its place in ``restarts``, when it was asked."""
        self.api_key = api_key
        self.replicas = [Replica(index=i, base_url="", log=str(run_dir / f"server-{i}.log")) for i in range(replicas)]
        self.engine = self._engine.name
        self.engine_args = self._engine.args
        self.engine_version: str | None = None
        self.model_facts = self._engine.facts()
        self.shares_host: bool | None = None
        """True when load workers run on the machine of a replica."""
        self.shared_cores: bool | None = None
        """True when load workers may run on processors that a replica runs on."""
        self.restarts: list[Restart] = []

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
        chosen: list[Node | None] = [None] * len(self.replicas)
        if not self._tier.accelerator_count:
            chosen = [*choose_nodes(self._nodes, need, len(self.replicas), self._tier.vcpu)]
        for node in chosen:
            shape, strategy = bundles(need, node)
            self._groups.append(placement_group(shape, strategy=strategy))
        self._wait_placed()
        for replica, group in zip(self.replicas, self._groups, strict=True):
            self._owners += [self._own(replica, group, part) for part in range(need.hosts)]
        nodes = self._gather([o.actor.node_id.remote() for o in self._owners], ACTOR_S, "its Ray actor did not start")
        for owner, node_id in zip(self._owners, nodes, strict=True):
            owner.node = node_id
        self._gather([o.actor.prepare.remote() for o in self._owners], WEIGHTS_S, "its weights took too long")
        started = self._gather(self._start_servers(), self._ready_s + 60, "no answer")
        cpus = []
        for owner, server in zip(self._owners, started, strict=True):
            cpus.append(server.cpus)
            if owner.part == 0:
                replica = self.replicas[owner.replica]
                replica.base_url, replica.ready_s = server.base_url, server.ready_s
                self._say(f"replica {owner.replica} ready after {server.ready_s:.0f} s at {server.base_url}")
        if cpus[0] is not None:
            self.model_facts["cpus_per_replica"] = f"{len(cpus[0])} of the tier's {self._tier.vcpu}"
        self.engine_version = probe.engine_version(self.replicas[0].base_url, self.api_key)
        self._place_load(cpus)

    def _wait_placed(self) -> None:
        """Until Ray has reserved every replica's hardware. It exists: `shortage` was asked; it may be taken."""
        deadline = time.monotonic() + PLACE_S
        told = False
        for index, group in enumerate(self._groups):
            while not group.wait(1):
                if not told:
                    told = True
                    self._say(f"replica {index} is queued: other jobs of the cluster hold the hardware it needs")
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"replica {index}: the cluster has {self._tier.name}, but other jobs held it for "
                        f"{PLACE_S:.0f} s; see `ray status`, or run again when they are done"
                    )

    def _own(self, replica: Replica, group: Any, part: int) -> _Owner:
        """An actor on one bundle of a replica's placement group."""
        options: dict[str, Any] = {
            "num_cpus": ACTOR_CPUS,
            "max_concurrency": 8,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=part),
        }
        if self._tier.accelerator_count:
            options["num_gpus"] = self._tier.accelerator_count
        name = f"replica {replica.index}" + (f" part {part}" if part else "")
        log = Path(replica.log or "") if not part else self._run_dir / f"server-{replica.index}-part-{part}.log"
        host = "127.0.0.1" if len(self._nodes) == 1 else ""
        actor = ray.remote(**options)(ReplicaActor).remote(self._engine, name, str(log), self.api_key, host)
        return _Owner(actor, replica.index, part, log)

    def _start_servers(self) -> list[Any]:
        """Set all servers off at once; one reference per owner."""
        vcpu = None if self._tier.accelerator_count else self._tier.vcpu
        at = [owner.node for owner in self._owners]
        refs = []
        meeting = ("", 0)
        for i, owner in enumerate(self._owners):
            part = Part()
            if self._engine.hosts > 1:
                if owner.part == 0:
                    (meeting,) = self._gather([owner.actor.meeting_point.remote()], ACTOR_S, "no answer")
                part = Part(rank=owner.part, hosts=self._engine.hosts, master=meeting[0], master_port=meeting[1])
            rank = at[:i].count(owner.node)
            refs.append(owner.actor.start.remote(self._ready_s, vcpu, rank, at.count(owner.node), part))
        return refs

    def _gather(self, refs: list[Any], timeout_s: float, late: str) -> list[Any]:
        """Results of one call to every owner, in order; raises `ServerError` at the first failure."""
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        while len(results) < len(refs):
            waiting = [ref for i, ref in enumerate(refs) if i not in results]
            done, _ = ray.wait(waiting, num_returns=1, timeout=0.5)
            self._listen()
            for ref in done:
                index = refs.index(ref)
                try:
                    results[index] = ray.get(ref)
                except RayError as e:
                    replica = self._owners[index].replica
                    raise ServerError(f"replica {replica}: its Ray actor failed: {last_line(e)}") from e
                if isinstance(results[index], Failed):
                    raise ServerError(results[index].message)
            if not done:
                self._check_starting(results, refs, deadline, timeout_s, late)
        return [results[i] for i in range(len(refs))]

    def _check_starting(
        self, results: dict[int, Any], refs: list[Any], deadline: float, timeout_s: float, late: str
    ) -> None:
        """Raises `ServerError` when a host is lost or the time is over."""
        missing = [self._owners[i].replica for i in range(len(refs)) if i not in results]
        if time.monotonic() > deadline:
            raise ServerError(f"replica {missing[0]}: {late} (waited {timeout_s:.0f} s)")
        for owner in self._owners:
            if owner.question is not None and owner.question.lost:
                raise ServerError(f"replica {owner.replica}: {owner.question.lost}")

    def _place_load(self, cpus: list[list[int] | None]) -> None:
        """Choose where load workers go: nodes without a replica, else processors without one, else beside them."""
        servers = [owner.node for owner in self._owners]
        self._load_nodes = choose_load_nodes(self._nodes, servers)
        self.shares_host = self.shared_cores = any(node.node_id in servers for node in self._load_nodes)
        here = [c for owner, c in zip(self._owners, cpus, strict=True) if owner.node == self._nodes[0].node_id]
        if self.shares_host and len(self._nodes) == 1 and all(c is not None for c in here):
            spare = sorted(os.sched_getaffinity(0) - {cpu for c in here for cpu in c or ()})
            if spare:
                self._spare_cpus, self.shared_cores = spare, False
        if self.shared_cores:
            self._say("warning: load workers share processors with a server, which makes it look slower than it is")

    # -- while it runs ------------------------------------------------------------------------------------------------

    @property
    def states(self) -> list[str]:
        """Of each replica: queued, starting, loading, compiling or ready (`cluster.engine.STATES`)."""
        return [owner.state for owner in self._owners if owner.part == 0]

    def _listen(self, wait_s: float = 0.0) -> None:
        """Ask every owner for news and take what has come: words, states, logs from other hosts, ends."""
        placed = [owner for owner in self._owners if owner.node]  # an unplaced actor could leave a question open
        refs = [ref for owner in placed if (ref := owner.look()) is not None]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=wait_s)
        for owner in placed:
            assert owner.question is not None
            look: Look | None = owner.question.answer()
            if look is not None:
                self._take(owner, look)
            elif owner.question.lost and owner.ended is None:
                owner.ended = owner.question.lost
                if owner.offset:
                    append(owner.log, LOG_FILE_NOTE.encode())

    def _take(self, owner: _Owner, look: Look) -> None:
        for message in look.messages:
            self._say(f"replica {owner.replica}: {message}")
        if look.state != owner.state:
            owner.state = look.state
            if look.state not in ("queued", "ready"):
                self._say(f"replica {owner.replica}: {look.state}")
        if owner.replica not in self._restarting:  # till then it is the old death
            owner.ended = look.ended
        if look.log:
            append(owner.log, look.log)
            owner.offset += len(look.log)

    def check(self) -> dict[int, str]:
        """Replicas that have ended, index -> how; recorded in ``replicas`` as well. Waits a second at most.

        A server ends with its process, with /health failing for long, or with its host. With ``on_replica_death``
        "restart" it is started again instead (`restarts`), and reported here only when that fails.
        """
        for host in self._hosts:
            host.fetch()
        self._listen(CHECK_S)
        died: dict[int, str] = {}
        for owner in self._owners:
            replica = self.replicas[owner.replica]
            if replica.index in self._restarting:
                self._finish_restart(replica)
            elif owner.ended and replica.exit is None and not self._restart(owner, owner.ended):
                replica.exit = owner.ended
            if replica.exit is not None:
                died[replica.index] = replica.exit
        return died

    def _restart(self, owner: _Owner, how: str) -> bool:
        """Begin to start a dead server again at its address; false when that is not wanted or cannot be."""
        lost = owner.question is not None and owner.question.lost
        if not self._restarts_wanted or lost or self._engine.hosts > 1:
            return False
        self._say(f"replica {owner.replica} is gone ({how}); starting it again")
        ref = owner.actor.restart.remote(self._ready_s)
        self._restarting[owner.replica] = (ref, len(self.restarts), time.monotonic())
        self.restarts.append(Restart(replica=owner.replica, died=now_utc(), how=how))
        return True

    def _finish_restart(self, replica: Replica) -> None:
        ref, place, since = self._restarting[replica.index]
        took_s = time.monotonic() - since
        done, _ = ray.wait([ref], timeout=0)
        if not done and took_s <= self._ready_s + 60:
            return
        del self._restarting[replica.index]
        (answer,) = ask([ref], 0)
        if answer is None or isinstance(answer, Failed):
            why = answer.message.splitlines()[0] if answer else "no answer from its host"
            replica.exit = f"{self.restarts[place].how}; not started again: {why}"
            return
        self.restarts[place] = replace(self.restarts[place], ready=now_utc(), took_s=round(took_s, 1))
        self._say(f"replica {replica.index} answers again after {took_s:.0f} s; the run is marked")
        for owner in self._owners:
            if owner.replica == replica.index:
                owner.ended = owner.question = None  # an answer still on its way may tell of the old death

    def counters(self) -> list[dict[str, float] | None]:
        """Each server's own counters now; null from one that does not answer."""
        return [probe.counters(replica.base_url, self.api_key) for replica in self.replicas]

    @property
    def launch(self) -> Launch | None:
        """How to start load workers; null when they are best ordinary children of this process."""
        if self._spare_cpus is not None:
            return partial(start_here, cpus=self._spare_cpus)
        if all(node.here for node in self._load_nodes):
            return None
        return self._launch

    def _launch(self, job: Job) -> Child:
        """Start a load worker on the next load node."""
        node = self._load_nodes[len(self._workers) % len(self._load_nodes)]
        if node.here:
            child: Child = start_here(job)
            self._workers.append(child)
            return child
        worker = RemoteWorker(node, job)
        self._workers.append(worker)
        worker.begin()
        return worker

    @contextmanager
    def sample_hosts(self, run: RunDir, start_unix_ns: int) -> Iterator[None]:
        """Counters of this host and of every host with a replica or load workers, each second, beside the results."""
        used = {owner.node for owner in self._owners} | {node.node_id for node in self._load_nodes}
        remote = [
            RemoteHost(node, host_file(run.path, node.address))
            for node in self._nodes
            if node.node_id in used and not node.here
        ]
        self._hosts = remote
        here = self._nodes[0].address if len(self._nodes) > 1 else "local"
        with HostMetrics(host_file(run.path, here), start_unix_ns) as metrics:
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
        owners, self._owners = self._owners, []
        workers, self._workers = self._workers, []
        groups, self._groups = self._groups, []
        head, self._ray = self._ray, None
        try:
            if head is not None and head.poll() is not None:
                # Our own Ray is gone, and what it ran with it. Asking it would block until Ray ends this very process.
                for worker in workers:
                    if isinstance(worker, Process):
                        worker.stop(grace_s)
            elif ray.is_initialized():
                for worker in workers:
                    worker.stop(grace_s)
                self._stop_servers(owners, grace_s)
                for group in groups:
                    with contextlib.suppress(RayError):
                        remove_placement_group(group)
        finally:
            if self._joined:
                self._joined = False
                disconnect(head)

    def _stop_servers(self, owners: list[_Owner], grace_s: float) -> None:
        """End the servers, bring the rest of their logs home, end their actors."""
        there = [owner for owner in owners if not (owner.question and owner.question.lost)]
        refs = [owner.actor.stop.remote(grace_s) for owner in there]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=grace_s + LOST_S)
        for owner in there:
            while owner.node:  # it comes in pieces
                (look,) = ask([owner.actor.look.remote(owner.offset)])
                if look is None or not look.log:
                    break
                append(owner.log, look.log)
                owner.offset += len(look.log)
        ask([owner.actor.clean.remote() for owner in there if owner.node])
        for owner in owners:
            with contextlib.suppress(RayError):
                ray.kill(owner.actor)


def append(file: Path, data: bytes) -> None:
    """Add to a log; a full disk must not stop a run."""
    with contextlib.suppress(OSError), file.open("ab") as out:
        out.write(data)
