"""Replicas of one model on one tier, started through Ray: one actor per replica, each owning one process group.

Local Ray is started when RAY_ADDRESS names no cluster. Kill order: the process group first, then the actor; killing the
actor alone would leave its server to the guard. The GPU path is complete but has not run on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.actors import Failed, RemoteProcess, ReplicaActor, WorkerActor
from cluster.load import Launch
from cluster.models import Model
from cluster.process import GRACE_S, Process, wait_ready
from cluster.vllm import Command, VllmEngine
from harness import probe
from harness.errors import ServerError, UsageError
from harness.run import Replica, Tier

if "RAY_ADDRESS" not in os.environ:
    # A Ray of our own lets in only who has this run's token. Ray reads these once, when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as e:
    raise UsageError("package ray is missing; install the harness with its [cpu] or [gpu] extra") from e

NAMESPACE = "harness"
ACTOR_CPUS = 0.05
"""What an actor asks Ray for: the real work happens in its process, and one core has to hold server and load actors."""
ACTOR_S = 120.0
"""An actor that is not placed and up by then will not come."""
ASK_S = 15.0
"""Deadline of one small question to an actor."""
READY_S = 600.0
WEIGHTS_S = 4 * 3600.0
"""A host may have to download the weights first."""
RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a notice; our CPU actors have no GPU to hide
}
RAY_S = 120.0
"""Ray on this machine is up after a few seconds."""


class Engine(Protocol):
    """What a deployment needs to know of a kind of server. Pickled to the replica's host."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def served_model(self) -> str: ...  # noqa: D102
    @property
    def args(self) -> list[str]: ...  # noqa: D102
    def facts(self) -> dict[str, str]: ...  # noqa: D102
    def prepare(self, say: Callable[[str], None]) -> object: ...  # noqa: D102
    def command(self, host: str, port: int, api_key: str) -> Command: ...  # noqa: D102
    def explain(self, lines: Sequence[str]) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEngine:
    """Any OpenAI-compatible server by its command line; ``{host}`` and ``{port}`` in ``argv`` are filled in."""

    name: str
    served_model: str
    argv: tuple[str, ...]
    api_key_env: str = "VLLM_API_KEY"

    @property
    def args(self) -> list[str]:
        """The command without host and port."""
        return [word for word in self.argv if "{" not in word]

    def facts(self) -> dict[str, str]:
        """Nothing is known of what a foreign command serves."""
        return {}

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing to fetch."""

    def command(self, host: str, port: int, api_key: str) -> Command:
        """The command for this address."""
        argv = [word.format(host=host, port=port) if "{" in word else word for word in self.argv]
        return Command(argv=argv, env={self.api_key_env: api_key})

    def explain(self, lines: Sequence[str]) -> str | None:
        """Nothing is known of its messages but a taken port."""
        return "port in use" if "address already in use" in "\n".join(lines).lower() else None


class Deployment:
    """Model servers for the length of a ``with`` block.

    ``replicas``, ``engine``, ``engine_version``, ``engine_args``, ``model_facts`` and ``shares_host`` describe them
    once they are ready. Entering raises `ServerError` when one of them does not come up, after all were ended again.
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
    ) -> None:
        if replicas < 1:
            raise UsageError(f"--replicas {replicas}: at least one server is needed")
        self._engine: Engine = engine or VllmEngine(model=model, tier=tier, weights=weights)
        self._tier, self._run_dir, self._say, self._ready_s = tier, run_dir, say, ready_s
        self._joined = False
        """This deployment connected to Ray, so it disconnects."""
        self._ray: Process | None = None
        """Ray itself, when it was started here."""
        self._actors: list[Any] = []
        self._workers: list[RemoteProcess] = []
        self._nodes: list[str] = []
        self._load_nodes: list[str] = []
        self.api_key = api_key
        self.replicas = [Replica(index=i, base_url="", log=str(run_dir / f"server-{i}.log")) for i in range(replicas)]
        self.engine = self._engine.name
        self.engine_args = self._engine.args
        self.engine_version: str | None = None
        self.model_facts = self._engine.facts()
        self.shares_host: bool | None = None
        """True when load workers run on the machine of a replica."""

    def __enter__(self) -> Deployment:
        try:
            self._start()
        except BaseException:  # whatever it was, Ctrl-C included: leave nothing running
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _start(self) -> None:
        self._joined = not ray.is_initialized()
        self._ray = connect(self._say)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        need = resources(self._tier)
        if problem := shortage([node["Resources"] for node in nodes], need, len(self.replicas)):
            raise ServerError(f"{len(self.replicas)} x {self._tier.name}: {problem}")
        loopback = len(nodes) == 1
        options: dict[str, Any] = {"num_cpus": ACTOR_CPUS, "max_concurrency": 8, "scheduling_strategy": "SPREAD"}
        if self._tier.accelerator_count:
            own = {k: v for k, v in need.items() if k not in ("CPU", "GPU")}
            options |= {"num_gpus": self._tier.accelerator_count, "resources": own}
        actor = ray.remote(**options)(ReplicaActor)
        one = len(self.replicas) == 1
        self._say(f"starting {'a server' if one else f'{len(self.replicas)} servers'}: {self._engine.served_model}, "
                  f"{self.engine}, {self._tier.name}")  # fmt: skip
        for replica in self.replicas:
            name = f"replica {replica.index}"
            self._actors.append(actor.remote(self._engine, name, replica.log, self.api_key, loopback))
        self._nodes = self._gather([a.node_id.remote() for a in self._actors], ACTOR_S, "no node took its Ray actor")
        self._gather([a.prepare.remote() for a in self._actors], WEIGHTS_S, "its weights took too long")
        vcpu = None if self._tier.accelerator_count else self._tier.vcpu
        refs = []
        for i, (a, node) in enumerate(zip(self._actors, self._nodes, strict=True)):
            refs.append(a.start.remote(self._ready_s, vcpu, self._nodes[:i].count(node), self._nodes.count(node)))
        for replica, started in zip(self.replicas, self._gather(refs, self._ready_s + 60, "no answer"), strict=True):
            replica.base_url, replica.ready_s = started.base_url, started.ready_s
            if started.cpus is not None:
                self.model_facts["cpus_per_replica"] = f"{len(started.cpus)} of the tier's {vcpu}"
            self._say(f"replica {replica.index} ready after {started.ready_s:.0f} s at {started.base_url}")
        self.engine_version = probe.engine_version(self.replicas[0].base_url, self.api_key)
        self._choose_load_nodes([node["NodeID"] for node in nodes])

    def _gather(self, refs: list[Any], timeout_s: float, late: str) -> list[Any]:
        """Results of one call to every replica, in order; raises `ServerError` at the first failure."""
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        while len(results) < len(refs):
            waiting = [ref for i, ref in enumerate(refs) if i not in results]
            done, _ = ray.wait(waiting, num_returns=1, timeout=0.5)
            self._relay()
            for ref in done:
                index = refs.index(ref)
                try:
                    results[index] = ray.get(ref)
                except RayError as e:
                    raise ServerError(f"replica {index}: its Ray actor failed: {last_line(e)}") from e
                if isinstance(results[index], Failed):
                    raise ServerError(results[index].message)
            if not done and time.monotonic() > deadline:
                late_ones = [i for i in range(len(refs)) if i not in results]
                raise ServerError(f"replica {late_ones[0]}: {late} (waited {timeout_s:.0f} s)")
        return [results[i] for i in range(len(refs))]

    def _relay(self) -> None:
        """Pass on what the replicas' hosts have to say (a weights download, a second try)."""
        if not self._nodes:
            return  # not all actors are placed yet: a question could wait for ever
        for index, messages in enumerate(self._ask([a.messages.remote() for a in self._actors])):
            for message in messages or []:
                self._say(f"replica {index}: {message}")

    def _ask(self, refs: list[Any]) -> list[Any]:
        """Answers to one small question each; null from an actor that is gone or does not answer in time."""
        answers: list[Any] = []
        ray.wait(refs, num_returns=len(refs), timeout=ASK_S)
        for ref in refs:
            try:
                answers.append(ray.get(ref, timeout=0.1))
            except RayError:
                answers.append(None)
        return answers

    def check(self) -> dict[int, str]:
        """Replicas that have ended, index -> how; recorded in ``replicas`` as well. A late answer counts as alive."""
        refs = [a.ended.remote() for a in self._actors]
        ray.wait(refs, num_returns=len(refs), timeout=ASK_S)
        died: dict[int, str] = {}
        for replica, ref in zip(self.replicas, refs, strict=True):
            try:
                how = ray.get(ref, timeout=0.1)
            except GetTimeoutError:
                continue
            except RayError as e:
                how = f"its host or Ray actor died ({last_line(e)})"
            if how:
                died[replica.index] = replica.exit = how
        return died

    def counters(self) -> list[dict[str, float] | None]:
        """Each server's own counters now; null from one that does not answer."""
        return [probe.counters(replica.base_url, self.api_key) for replica in self.replicas]

    @property
    def launch(self) -> Launch | None:
        """How to start load workers on the cluster; null when they are best children of this process."""
        return self._launch if self._load_nodes else None

    def _choose_load_nodes(self, nodes: list[str]) -> None:
        """Where load workers go: hosts that see the run directory, those without a replica first."""
        here = ray.get_runtime_context().get_node_id()
        if len(nodes) == 1:
            self.shares_host = True
            return
        look = ray.remote(num_cpus=0)(Path.is_dir)
        refs = [look.options(scheduling_strategy=on(node)).remote(self._run_dir) for node in nodes]
        able = [node for node, seen in zip(nodes, self._ask(refs), strict=True) if seen] or [here]
        free = [node for node in able if node not in self._nodes]
        chosen = free or able
        self.shares_host = not free
        self._load_nodes = [] if chosen == [here] else chosen

    def _launch(
        self, argv: Sequence[str], *, name: str, env: Mapping[str, str | None], log: Path, pipes: bool = True
    ) -> RemoteProcess:
        """Start a load worker under a Ray actor on the next load node."""
        node = self._load_nodes[len(self._workers) % len(self._load_nodes)]
        actor = ray.remote(num_cpus=ACTOR_CPUS, max_concurrency=8, scheduling_strategy=on(node))(WorkerActor).remote()
        worker = RemoteProcess(actor, name, log)
        self._workers.append(worker)
        worker.begin(list(argv), dict(env), pipes)
        return worker

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End every server and worker, then Ray if it was started here. Idempotent."""
        actors, self._actors = self._actors, []
        workers, self._workers = self._workers, []
        if not ray.is_initialized():
            return
        for worker in workers:
            worker.stop(grace_s)
        refs = [a.stop.remote(grace_s) for a in actors]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=grace_s + 45)
        for replica, actor in zip(self.replicas, actors, strict=False):
            self._collect_log(replica, actor)
            with contextlib.suppress(RayError):
                ray.kill(actor)
        head, self._ray = self._ray, None
        if self._joined:
            disconnect(head)

    def _collect_log(self, replica: Replica, actor: Any) -> None:
        """Bring the log of a server on another host home."""
        if replica.log is None or Path(replica.log).exists():
            return
        (text,) = self._ask([actor.log_bytes.remote()])
        if text:
            with contextlib.suppress(OSError):
                Path(replica.log).write_bytes(text)


def connect(say: Callable[[str], None]) -> Process | None:
    """Join the cluster RAY_ADDRESS names; null. Or start Ray here; its process, which is the caller's to stop."""
    if ray.is_initialized():
        return None
    address = os.environ.get("RAY_ADDRESS")
    if address:
        say(f"joining the Ray cluster at {address}")
        what = f"Ray cluster {address} (RAY_ADDRESS)"
        host, _, port = address.rpartition(":")
        if host and port.isdigit():  # Ray itself would try for minutes
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            except OSError as e:
                raise ServerError(f"{what}: nothing answers there ({e}); start it, or unset RAY_ADDRESS") from e
        _join(address, what)
        return None
    with tempfile.TemporaryDirectory(prefix="harness-ray-") as folder:
        head = Process.start(
            [sys.executable, "-m", "cluster.head"], name="Ray", env=RAY_ENV, log=Path(folder) / "log", pipes=True
        )  # fmt: skip
        found: list[str] = []

        def started() -> bool:
            found.extend(json.loads(line)["address"] for line in head.lines() if line.startswith('{"address"'))
            return bool(found)

        try:
            wait_ready(started, head, RAY_S, poll_s=0.05)
            _join(found[0], "Ray on this machine")
        except BaseException:
            head.kill()
            raise
    return head


def disconnect(head: Process | None) -> None:
    """Leave Ray, and end it when `connect` started it here."""
    ray.shutdown()
    if head is not None:
        head.stop()


def _join(address: str, what: str) -> None:
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (RayError, OSError, RuntimeError, ValueError) as e:
        raise ServerError(
            f"{what}: {last_line(e)}; is it up, has it the same Ray and Python version, and have we its token "
            f"(RAY_AUTH_MODE, RAY_AUTH_TOKEN)? Logs on its host: /tmp/ray/session_latest/logs"
        ) from e


def resources(tier: Tier) -> dict[str, float]:
    """What Ray must have for one replica."""
    if not tier.accelerator_count:
        return {"CPU": ACTOR_CPUS}
    # Ray names a node's accelerator model as a resource; a sliver of it ties the replica to that model.
    return {"CPU": ACTOR_CPUS, "GPU": float(tier.accelerator_count), f"accelerator_type:{tier.accelerator}": 0.001}


def shortage(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float], replicas: int) -> str | None:
    """What the cluster lacks for this many replicas, each on one node; null when they fit. Pure, in totals."""
    fits = sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in need.items()) for node in nodes)
    if fits >= replicas:
        return None
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in need.items() if amount >= 1 or ":" in name)
    there = [
        ", ".join(f"{node[name]:g} {name}" for name in sorted(node) if name in ("CPU", "GPU") or "accelerator" in name)
        for node in nodes
    ]
    return (
        f"the Ray cluster has room for {fits}; each needs {wanted or 'a CPU'} on one node; "
        f"nodes: {'; '.join(there) or 'none'}. Join a cluster that has them (RAY_ADDRESS) or choose another --tier"
    )


def on(node: str) -> NodeAffinitySchedulingStrategy:
    """Exactly this node."""
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def last_line(e: BaseException) -> str:
    """The last line of an error: Ray puts a whole remote traceback before it."""
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(e).__name__
