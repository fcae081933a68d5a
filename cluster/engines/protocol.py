"""What a deployment needs to know of a kind of server. A new kind is one file with one class that has these members.

vLLM, on accelerators and on CPUs, is `cluster.engines.vllm.VllmEngine`; any other command line is `CommandEngine`. A
server that is there already (``--base-url``) is never started, so it needs none
(`harness.cli.runner.targets.UrlTarget`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from harness.cluster.process.process import Cause
from harness.record.manifest import Evidence, Tier

State = Literal["queued", "starting", "loading", "compiling", "ready"]
"""What a replica goes through, in this order; a kind of server may skip some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run. ``argv`` holds no secret; ``env`` may. None in ``env`` removes a variable."""

    argv: list[str]
    env: dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One host's part of a server that spans several: number ``rank`` of ``hosts``; number 0 answers requests."""

    rank: int = 0
    hosts: int = 1
    master: str = ""
    """Address of part 0, where the parts meet; empty for a server on one host."""
    master_port: int = 0


WHOLE = Part()


class Engine(Protocol):
    """A kind of server. Pickled to the replica's host."""

    @property
    def name(self) -> str:
        """Kind of engine, for the manifest."""

    @property
    def evidence(self) -> Evidence:
        """What its answers show: "measured" of a real server, "simulated" of a model of one."""

    @property
    def served_model(self) -> str:
        """The model name to send."""

    @property
    def args(self) -> list[str]:
        """Arguments that shape speed and answers, for the manifest."""

    @property
    def hosts(self) -> int:
        """Machines of the tier that one replica spans; 1 unless it is too large for one."""

    @property
    def memory_gib(self) -> float | None:
        """Main memory one replica takes of its host, GiB; null when not known or not the limit."""

    def misfit(self, tier: Tier) -> str | None:
        """Why it cannot serve on this tier, with what to choose instead; null when it can, as far as is known."""

    def facts(self) -> dict[str, str]:
        """What it serves: source, checksum, number format."""

    def prepare(self, say: Callable[[str], None]) -> object:
        """What takes long before a start (weights), on the replica's host."""

    def command(self, host: str, port: int, api_key: str, part: Part = WHOLE) -> Command:
        """The server's command on its host."""

    def state(self, line: str) -> State | None:
        """The `State` that a line of the log begins; null when it says nothing of that."""

    def explain(self, lines: Sequence[str]) -> Cause | None:
        """Why it died, from the end of its log; null when no line is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEngine:
    """Any OpenAI-compatible server by its command line; ``{host}`` and ``{port}`` in ``argv`` are filled in."""

    name: str
    served_model: str
    argv: tuple[str, ...]
    api_key_env: str = "VLLM_API_KEY"
    hosts: int = 1
    memory_gib: float | None = None
    evidence: Evidence = "measured"
    tiers: tuple[str, ...] = ()
    """Names of the tiers it runs on; none: any."""

    @property
    def args(self) -> list[str]:
        """The command without host and port."""
        return [word for word in self.argv if "{" not in word]

    def misfit(self, tier: Tier) -> str | None:
        """It runs where it was said to."""
        if not self.tiers or tier.name in self.tiers:
            return None
        return f"{self.name} does not run on tier {tier.name}: choose {' or '.join(self.tiers)}"

    def facts(self) -> dict[str, str]:
        """Nothing is known of what a foreign command serves."""
        return {}

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing to fetch."""

    def command(self, host: str, port: int, api_key: str, part: Part = WHOLE) -> Command:
        """The command for this address."""
        argv = [word.format(host=host, port=port) if "{" in word else word for word in self.argv]
        return Command(argv=argv, env={self.api_key_env: api_key})

    def state(self, line: str) -> State | None:
        """Nothing is known of its log."""
        return None

    def explain(self, lines: Sequence[str]) -> Cause | None:
        """Nothing is known of its messages but a taken port."""
        return port_taken(lines)


def port_taken(lines: Sequence[str]) -> Cause | None:
    """The cause of a death that a log names where only the system's own words are known; None: another one."""
    taken = any("address already in use" in line.lower() for line in lines)
    return Cause("port in use", port_taken=True) if taken else None
