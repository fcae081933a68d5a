"""The driver's side of servers that were started: their news, their logs, their deaths and new starts.

Nothing here waits for a host that may be gone: a question is left open (`cluster.deploy.ray_session.Question`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.cluster.deploy.ray_session import LOST_S, Question, ask, end_actor, head_gone
from harness.cluster.deploy.remote import clock_offset_ns
from harness.cluster.deploy.servers import Failed, Look
from harness.cluster.engines.protocol import State
from harness.record.manifest import Replica, Restart, RunDir, now_utc
from harness.record.samples import ProcessorSeconds

import ray  # isort: skip  # after harness.cluster.deploy.ray_session, which sets what Ray reads when it is imported
from ray.exceptions import GetTimeoutError, RayError  # isort: skip

CHECK_S = 1.0
"""`Supervisor.check` waits this long for answers; late ones are taken the next time."""
MOST_RESTARTS = 5
"""Of one replica: a server that goes on dying is broken, and to start it again for ever would be a wait without end."""
RESTART_SLACK_S = 60.0
"""Above what a server is given to get ready."""
LOG_FILE_NOTE = "(the rest of this log stayed on a host that was lost)\n"


@dataclass(slots=True)
class ServerHost:
    """An actor that owns servers of this deployment on one node, as far as the driver knows."""

    actor: Any
    owners: list[PartOwner] = field(default_factory=list)
    node: str = ""
    """Empty until the actor is placed; one that is not could leave a question open."""
    question: Question | None = None

    @property
    def lost(self) -> str | None:
        """Why nothing more is heard from it; null while something may be."""
        return self.question.lost if self.question else None

    def ask(self) -> Any:
        """Ask for news of its servers, unless a question is open."""
        self.question = self.question or Question(self.look)
        return self.question.send()

    def look(self) -> Any:
        """News of its servers, to be waited for."""
        return self.actor.look.remote([owner.offset for owner in self.owners])

    def sample(self, start_unix_ns: int) -> bool:
        """Have it sample what its servers run and wait; false when it does not answer."""
        with contextlib.suppress(RayError, GetTimeoutError):
            if self.node and not self.lost:
                ahead_ns = clock_offset_ns(lambda: ray.get(self.actor.clock_ns.remote(), timeout=LOST_S))
                self.actor.sample.remote(start_unix_ns + ahead_ns)
                return True
        return False


@dataclass(slots=True)
class PartOwner:
    """One part of a replica (as good as always the whole) in its host's actor."""

    host: ServerHost
    place: int
    """Its number among ``host.owners``."""
    replica: int
    part: int
    log: Path
    state: State = "queued"
    offset: int = 0
    """Of the log, when it comes from another host."""
    ended: str | None = None
    start: int = 1
    """The start of its server that counts: what is said of an earlier one is of a death that is known."""
    seconds: ProcessorSeconds | None = None
    """Where what its processes ran and waited goes; null while that is not sampled."""

    def take(self, look: Look, say: Callable[[str], None]) -> None:
        """What its actor said."""
        for message in look.messages:
            say(f"replica {self.replica}: {message}")
        if look.state != self.state:
            self.state = look.state
            if look.state not in ("queued", "ready"):
                say(f"replica {self.replica}: {look.state}")
        if look.start >= self.start:
            self.ended = look.ended
        if self.seconds is not None:
            self.seconds.write(look.seconds)
        if look.log:
            append(self.log, look.log)
            self.offset += len(look.log)


class Supervisor:
    """Follows the servers of one deployment. With ``restart`` a dead one is started again, at its address."""

    def __init__(
        self, replicas: Sequence[Replica], say: Callable[[str], None], *, restart: bool, ready_s: float
    ) -> None:
        self.hosts: list[ServerHost] = []
        self.owners: list[PartOwner] = []
        self.restarts: list[Restart] = []
        self._replicas, self._say, self._restart_wanted, self._ready_s = replicas, say, restart, ready_s
        self._restarting: dict[int, tuple[Any, int, float]] = {}
        """By replica: the answer to come, the place in `restarts`, when it was ordered."""
        self._headless_since: float | None = None

    def listen(self, wait_s: float = 0.0) -> None:
        """Ask every host for news and take what has come: words, states, logs from other hosts, ends."""
        placed = [host for host in self.hosts if host.node]
        if refs := [ref for host in placed if (ref := host.ask()) is not None]:
            ray.wait(refs, num_returns=len(refs), timeout=wait_s)
        for host in placed:
            assert host.question is not None
            looks: list[Look] | None = host.question.answer()
            if looks is not None:
                for owner, look in zip(host.owners, looks, strict=True):
                    owner.take(look, self._say)
            elif host.lost:
                for owner in host.owners:
                    if owner.ended is None:
                        owner.ended = host.lost
                        if owner.offset:
                            append(owner.log, LOG_FILE_NOTE.encode())

    @contextmanager
    def sampling(self, run: RunDir, start_unix_ns: int) -> Iterator[None]:
        """What the processes of each server run and wait for a processor, each second, beside the results.

        `listen` brings it home. A host that does not answer has none, which stops no run.
        """
        hosts = [host for host in self.hosts if host.sample(start_unix_ns)]
        owners = [owner for host in hosts for owner in host.owners]
        for owner in owners:
            owner.seconds = ProcessorSeconds(run.server_processor(owner.replica, owner.part))
        try:
            yield
        finally:
            ask([host.actor.end_samples.remote() for host in hosts if not host.lost])
            for _ in range(2):  # the first question may be an old one
                self.listen(CHECK_S)
            for owner in owners:
                if owner.seconds is not None:
                    owner.seconds.close()
                    if owner.seconds.trouble:
                        self._say(f"processor times: {owner.seconds.trouble}")
                owner.seconds = None

    def check(self) -> dict[int, str]:
        """Replicas that have ended, index -> how; recorded in them as well. Waits a second at most.

        A server ends with its process, with /health failing for long, or with its host. One that is being started again
        is not among them.
        """
        self.listen(CHECK_S)
        self._look_for_head()
        died: dict[int, str] = {}
        for owner in self.owners:
            replica = self._replicas[owner.replica]
            if replica.index in self._restarting:
                self._finish_restart(owner, replica)
            elif owner.ended and replica.exit is None and not self._restart(owner, owner.ended):
                replica.exit = owner.ended
            if replica.exit is not None:
                died[replica.index] = replica.exit
        return died

    def _look_for_head(self) -> None:
        """Without the cluster's head hosts go on answering for a minute; then Ray ends them, and this process."""
        if not head_gone():
            self._headless_since = None
            return
        self._headless_since = self._headless_since or time.monotonic()
        if time.monotonic() - self._headless_since > LOST_S:
            self._restart_wanted = False
            for owner in self.owners:
                owner.ended = owner.ended or f"the head of its Ray cluster has not answered for {LOST_S:.0f} s"

    @property
    def restarting(self) -> bool:
        """A dead server is being started again."""
        return bool(self._restarting)

    def _restart(self, owner: PartOwner, how: str) -> bool:
        """Begin to start a dead server again; false when that is not wanted or cannot be."""
        in_parts = any(other.part for other in self.owners)
        before = sum(restart.replica == owner.replica for restart in self.restarts)
        if not self._restart_wanted or owner.host.lost or in_parts or before >= MOST_RESTARTS:
            return False
        self._say(f"replica {owner.replica} is gone ({how}); starting it again")
        owner.start += 1
        answer = owner.host.actor.restart.remote(owner.place, self._ready_s)
        self._restarting[owner.replica] = answer, len(self.restarts), time.monotonic()
        self.restarts.append(Restart(replica=owner.replica, died=now_utc(), how=how))
        return True

    def _finish_restart(self, owner: PartOwner, replica: Replica) -> None:
        coming, place, since = self._restarting[replica.index]
        took_s = time.monotonic() - since
        done, _ = ray.wait([coming], timeout=0)
        if not done and took_s <= self._ready_s + RESTART_SLACK_S and not owner.host.lost:
            return
        del self._restarting[replica.index]
        (answer,) = ask([coming], 0)
        if answer is None or isinstance(answer, Failed):
            why = answer.message.splitlines()[0] if answer else "no answer from its host"
            replica.exit = f"{self.restarts[place].how}; not started again: {why}"
            return
        owner.ended = None
        self.restarts[place] = replace(self.restarts[place], ready=now_utc(), took_s=round(took_s, 1))
        self._say(f"replica {replica.index} answers again after {took_s:.0f} s; the run is marked")

    def stop(self, grace_s: float) -> None:
        """End the servers, bring the rest of their logs home, end their actors. A lost host is not waited for."""
        hosts, self.hosts, self.owners = self.hosts, [], []
        there = [host for host in hosts if not host.lost]
        if refs := [host.actor.stop.remote(grace_s) for host in there]:
            ray.wait(refs, num_returns=len(refs), timeout=grace_s + LOST_S)
        for host in there:
            while host.node:  # it comes in pieces
                (looks,) = ask([host.look()])
                for owner, look in zip(host.owners, looks or (), strict=False):
                    owner.take(look, lambda words: None)
                if not any(look.log for look in looks or ()):
                    break
        ask([host.actor.clean.remote() for host in there if host.node])
        for host in hosts:
            end_actor(host.actor)


def append(file: Path, data: bytes) -> None:
    """Add to a log; a full disk must not stop a run."""
    with contextlib.suppress(OSError), file.open("ab") as out:
        out.write(data)
