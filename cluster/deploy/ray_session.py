"""Joining Ray: the cluster that RAY_ADDRESS names, or one of our own on this machine, under a guard."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.cluster.deploy.placement import NICENESS, Node, check_ray_address
from harness.cluster.process.process import Process, wait_ready
from harness.cluster.process.registry import holders, reservations, visible_gpus
from harness.errors import ServerError, UsageError

if not os.environ.get("RAY_ADDRESS"):
    # A Ray of our own lets in only who has this run's token. Ray reads these once, when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # And it listens on loopback only: what Ray does on Windows and macOS, where it supports no clusters.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

# A driver that has lost the cluster's head is ended by Ray after this time, in the middle of whatever it does. By then
# it has noticed (`LOST_S`), ended the run and reported it.
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "300"  # noqa: SIM112 - so Ray spells it

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as e:
    raise UsageError("package ray is missing; install the harness with its [cpu] or [gpu] extra") from e

NAMESPACE = "harness"
OBJECT_STORE_BYTES = 100 << 20
"""Ray's own smallest is 75 MB; nothing large goes through it here."""
HEAD = f"""
import json, ray, signal
ray.init(address="local", include_dashboard=False, object_store_memory={OBJECT_STORE_BYTES}, log_to_driver=False,
         logging_level="ERROR")
print(json.dumps({{"address": ray.get_runtime_context().gcs_address}}), flush=True)
signal.pause()
"""
"""A Ray of this machine in a process of its own. Ray starts half a dozen processes, and some outlive a killed driver by
a minute; here all are below one command, so that its guard ends them like anything else. It says where it is, and
waits."""
RAY_ENV: dict[str, str | None] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a notice; our CPU actors have no GPU to hide
    "RAY_gcs_rpc_server_reconnect_timeout_s": None,  # that is for this process alone
    "HARNESS_API_KEY": None,  # actors are given it; their environment is for everyone they start
}
RAY_S = 120.0
"""Ray on this machine is up after a few seconds."""
LOST_S = 15.0
"""A host that leaves a question open for this long is lost to this run; a head that answers nobody, too."""
HEAD_S = 1.0
"""To connect to the head."""


def connect(say: Callable[[str], None]) -> Process | None:
    """Join the cluster RAY_ADDRESS names; null. Or start Ray here; its process, which is the caller's to stop.

    Raises `ServerError` when nothing answers or it does not let us in.
    """
    if ray.is_initialized():
        return None
    address = os.environ.get("RAY_ADDRESS")
    if address:
        say(f"joining the Ray cluster at {address}")
        what = f"Ray cluster {address} (RAY_ADDRESS)"
        check_ray_address(address)
        _init(address, what)
        return None
    with tempfile.TemporaryDirectory(prefix="harness-ray-") as folder:
        head = Process.start(
            [sys.executable, "-c", HEAD], name="Ray", env={**RAY_ENV, NICENESS: "0", **free_gpus(say)},
            log=Path(folder) / "log", pipes=True,
        )  # fmt: skip
        found: list[str] = []

        def started() -> bool:
            found.extend(json.loads(line)["address"] for line in head.lines() if line.startswith('{"address"'))
            return bool(found)

        try:
            wait_ready(started, head, RAY_S, poll_s=0.05)
            _init(found[0], "Ray on this machine")
        except BaseException:
            head.kill()
            raise
    return head


def free_gpus(say: Callable[[str], None]) -> dict[str, str]:
    """What hides the accelerators that other runs hold from a Ray of our own, as environment; says which those are."""
    held = [one for one in reservations() if one.gpus]
    if not held:
        return {}
    taken = {gpu for one in held for gpu in one.gpus}
    free = [gpu for gpu in visible_gpus() if gpu not in taken]
    say(f"{holders(held)}; this run has GPUs {','.join(free) or 'none'}")
    return {"CUDA_VISIBLE_DEVICES": ",".join(free)}


def disconnect(head: Process | None) -> None:
    """Leave Ray, and end it when `connect` started it here."""
    ray.shutdown()
    if head is not None:
        head.stop()


@contextmanager
def joined(say: Callable[[str], None]) -> Iterator[None]:
    """Connected for the length of a ``with`` block."""
    mine = not ray.is_initialized()
    head = connect(say)
    try:
        yield
    finally:
        if mine:
            disconnect(head)


def _init(address: str, what: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (RayError, OSError, RuntimeError, ValueError) as e:
        raise ServerError(
            f"{what}: {last_line(e)}; is it up, has it the same Ray and Python version, and have we its token "
            f"(RAY_AUTH_MODE, RAY_AUTH_TOKEN)? Logs on its host: /tmp/ray/session_latest/logs"
        ) from e
    finally:
        # Ray puts its own handler in place, which exits in the middle of whatever runs: no record, and an abort.
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def alive_nodes() -> list[Node]:
    """The cluster's nodes, the driver's own first."""
    here = ray.get_runtime_context().get_node_id()
    found = [
        Node(node_id=n["NodeID"], address=n["NodeManagerAddress"], here=n["NodeID"] == here, resources=n["Resources"])
        for n in ray.nodes()
        if n["Alive"]
    ]
    return sorted(found, key=lambda node: (not node.here, node.address))


def head_gone() -> bool:
    """Whether nobody answers at the address of the cluster's head: what asks it anything would wait, and be ended."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_S).close()
    except OSError:
        return True
    return False


def end_actor(actor: Any) -> None:
    """Have Ray end this actor. Without a head its host does, once it has noticed."""
    if not head_gone():
        with suppress(RayError):
            ray.kill(actor)


def on(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Exactly this node."""
    return NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)


def on_each(nodes: Sequence[Node], function: Callable[..., Any], *args: object, timeout_s: float) -> list[Any]:
    """``function(*args)`` on every node, in order; null from one that does not answer in time."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    return ask([task.options(scheduling_strategy=on(node.node_id)).remote(*args) for node in nodes], timeout_s)


def ask(refs: list[Any], timeout_s: float = LOST_S) -> list[Any]:
    """Answers to one small question each; null from an actor that is gone or does not answer in time."""
    done = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0] if refs else []
    answers: list[Any] = []
    for ref in refs:
        answers.append(None)
        with suppress(RayError):
            answers[-1] = ray.get(ref, timeout=0.1) if ref in done else None
    return answers


class Question:
    """One question at a time to an actor that may be on a lost host; never waited for."""

    def __init__(self, ask: Callable[[], Any], lost_s: float = LOST_S) -> None:
        self._ask, self._lost_s = ask, lost_s
        self._ref: Any = None
        self._asked = 0.0
        self.lost: str | None = None
        """Why no answer will come any more; null while one may."""

    def send(self) -> Any:
        """Ask, unless the last question is still open; the open question's reference, null once lost."""
        if self._ref is None and self.lost is None:
            self._ref, self._asked = self._ask(), time.monotonic()
        return self._ref

    def answer(self) -> Any:
        """The answer if it is there, else null; then the next question can be sent."""
        if self._ref is None:
            return None
        try:
            found = ray.get(self._ref, timeout=0)
        except GetTimeoutError:
            if time.monotonic() - self._asked > self._lost_s:
                self._ref, self.lost = None, f"its host has not answered for {self._lost_s:.0f} s"
            return None
        except RayError as e:
            self._ref, self.lost = None, f"its host or Ray actor died ({last_line(e)})"
            return None
        self._ref = None
        return found


def last_line(e: BaseException) -> str:
    """The last line of an error: Ray puts a whole remote traceback before it."""
    lines = [line for line in str(e).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(e).__name__
