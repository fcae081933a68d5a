"""What is measured as one: the same hardware, software, SLO and traffic. Runs of one differ in load alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from harness.analysis.rates import KIND_WORDS, LoadKind
from harness.analysis.stats.intervals import Evidence
from harness.analysis.summary import Summary

Key = tuple[object, ...]
BOUND = "--step-times=bound"
"""Argument of a simulated engine whose steps take what the chip's data sheet allows at best."""
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def grouped(items: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key, keys in the order in which they first come."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(by(item), []).append(item)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Hardware, software and traffic that are measured as one, as capacities and prices name them."""

    model: str
    label: str | None
    """What the user calls this system."""
    servers: tuple[str, ...]
    """Addresses of servers that were there already."""
    tier: str | None
    engine: str
    args: tuple[str, ...]
    replicas: int
    evidence: Evidence
    trace: str
    loop: LoadKind

    @property
    def costs_at_least(self) -> bool:
        """Whether its steps took what a chip does at best: its costs are lower bounds, never ranked."""
        return BOUND in self.args

    @property
    def name(self) -> str:
        """``model on tier``, with the number of replicas when there are several, address and label if there are any."""
        stated = " (as stated by you)" if self.tier and self.servers else ""
        several = f" x {self.replicas}" if self.replicas > 1 else ""
        where = f"{self.model} on {self.tier or 'no tier'}{stated}{several}"
        return where + where_words(self.label, self.servers)


def describe(s: Summary) -> System:
    """The system that a run was measured on."""
    return System(
        model=s.model, label=s.label, servers=servers_of(s), tier=s.tier.name if s.tier else None,
        engine=f"{s.engine} {s.server.version or ''}".strip(), args=tuple(s.server.args),
        replicas=max(1, s.cost.replicas), evidence=s.evidence, trace=s.plan.trace, loop=s.offered.kind,
    )  # fmt: skip


def hardware_of(s: Summary) -> Key:
    """Hardware, its price, model, engine and its arguments, and the kind of evidence: what a token costs there.

    Of servers that were there already only their address and the user's label tell them apart.
    """
    tier = (s.tier.name, s.tier.usd_per_hour) if s.tier else None
    return (tier, s.cost.replicas, s.model, s.engine, s.server.version, tuple(s.server.args), s.evidence, s.label,
            servers_of(s))  # fmt: skip


def servers_of(s: Summary) -> tuple[str, ...]:
    """Addresses of servers that were there already; none of those started for the run, whose ports are any."""
    return tuple(sorted(s.load.base_urls)) if s.engine == "url" else ()


def tier_words(s: Summary) -> str | None:
    """The tier by name, of a server that was there already as what it is: the user's word. None: none was stated."""
    if s.tier is None:
        return None
    return f"{s.tier.name} (as stated by you)" if s.engine == "url" else s.tier.name


def where_words(label: str | None, servers: Sequence[str]) -> str:
    """Label and address of a system, to stand behind its other names; empty where it has neither."""
    at = ", ".join(urlsplit(url).netloc or url for url in servers[:2]) + (", ..." if len(servers) > 2 else "")
    return (f" at {at}" if at else "") + (f" [{label}]" if label else "")


def system_of(s: Summary) -> Key:
    """What is priced as one: everything but the load, that is hardware, software, SLO, traffic and kind of loop.

    A closed loop is apart: it slows down with its server, so of two loops it would always look the cheaper. So is a cap
    on output lengths or in flight, another body or another way to draw arrivals: that is other traffic.
    """
    limits = None if s.slo is None else (tuple(sorted(s.slo.limits.items())), s.slo.attain)
    load, plan = s.load, s.plan
    drawn = (plan.arrivals, plan.burstiness, load.concurrency) if load.mode == "open" else None
    asked = (s.offered.kind, load.endpoint, load.stream, str(sorted(load.extra_body.items(), key=str)), plan.sessions,
             plan.conversation, plan.max_output_tokens, load.output_lengths, drawn)  # fmt: skip
    return (*hardware_of(s), limits, plan.trace_sha256, asked)


def load_of(s: Summary) -> Key:
    """The load that was asked for, without the seed: runs that agree in it are repeats of each other."""
    plan, load = s.plan, s.load
    if load.mode == "closed":
        return ("closed", load.concurrency, plan.requests)
    # drawn arrivals of one rate differ a little with the seed in the rate they come to
    drawn = tuple((stage.duration_s, stage.rate, stage.end_rate) for stage in plan.stages)
    return (s.offered.kind, plan.arrivals, drawn, plan.burstiness, None if drawn else plan.speed, load.concurrency,
            None if drawn else plan.requests)  # fmt: skip


def plan_of(s: Summary) -> Key:
    """What was asked of the servers, request by request: runs that agree in it had the same arrivals and lengths.

    A seed that only changes made-up prompts makes no other plan: arrivals are known by their counts and gaps.
    """
    plan, arrivals = s.plan, s.plan.planned
    times = None if arrivals is None else (arrivals.span_s, tuple(arrivals.counts), tuple(arrivals.gap_quantiles_s))
    own = s.plan_sha256 if arrivals is None and s.load.mode == "open" else None  # a plan of an older version
    return (plan.trace_sha256, plan.requests, plan.arrivals, times, own)


def offered(s: Summary) -> float:
    """The load as a number: requests in flight (closed loop), requests/s (open loop), or sessions started per second
    (sessions that wait: how many requests they send depends on the server). Raises ValueError where there is none.
    """
    if s.offered.kind == "closed":
        return float(s.load.concurrency or 0)
    if s.offered.kind == "sessions":
        started = s.offered.session_rate.value
        if started is None:
            raise ValueError(f"{s.run}: {s.offered.session_rate.note}")
        return float(f"{started:.4g}")
    if len(s.plan.stages) == 1 and s.plan.stages[0].end_rate in (None, s.plan.stages[0].rate):
        return s.plan.stages[0].rate  # drawn arrivals come to a slightly other rate with every seed
    rate = s.plan.planned_rate
    if rate is None:
        raise ValueError(f"{s.run}: its plan has no request rate")
    return float(f"{rate:.4g}")


def has_load(s: Summary) -> bool:
    """Whether the load of the run is a number (`offered`)."""
    if s.offered.kind == "sessions":
        return s.offered.session_rate.value is not None
    return s.offered.kind == "closed" or bool(s.plan.planned_rate or s.plan.stages)


def load_words(s: Summary) -> str:
    """The load in words: its kind, and how much of it."""
    kind, rate = KIND_WORDS[s.offered.kind], s.plan.planned_rate
    if s.offered.kind == "closed":
        return f"{kind}, {s.load.concurrency} in flight"
    if s.offered.kind == "open":
        return kind + (f", {rate:.3g} req/s planned" if rate is not None else "") + arrival_words(s)
    started, sent = s.offered.session_rate.value, s.offered.sent_rate.value
    said = [kind]
    if started is not None:
        said.append(f"{started:.3g} sessions/s started")
    if sent is not None:
        said.append(f"{sent:.3g} req/s sent" + (f" of {rate:.3g} planned" if rate is not None else ""))
    return ", ".join(said) + arrival_words(s)


def arrival_words(s: Summary) -> str:
    """How arrivals were drawn, in brackets; nothing for those of the trace itself and for a closed loop."""
    return "" if s.plan.arrivals in ("trace", "closed") else f" ({s.plan.arrivals} arrivals)"


def slo_words(s: Summary) -> str | None:
    """The SLO in words, criterion by criterion; None without."""
    return None if s.slo is None else ", ".join(sorted(one.name for one in s.slo.criteria))


def all_met(runs: Sequence[Summary]) -> bool | None:
    """Whether all runs kept the SLO; None without one, and where that is not known of a run."""
    met = [s.slo.met if s.slo is not None else None for s in runs]
    return False if False in met else None if None in met else True
