"""A sweep: models x tiers x load levels x repeats on one trace. What is asked (`SweepSpec`) and the points it makes.

What became of them is in `harness.sweep.state`, what they will cost in `harness.sweep.cost`.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from harness.errors import UsageError, unknown_name
from harness.plan.spec import drawn_seed, load_seed, with_load
from harness.untrusted import read_toml

Table = dict[str, object]
"""Of a file in TOML or JSON, before its types are checked."""
MOST_LEVELS = 1000
MOST_POINTS = 10_000
MOST_LOAD = 1e15


# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One model on one tier; its points share servers."""

    model: str | None = None
    """Null: the only model that the servers at ``base_url`` have."""
    tier: str | None = None
    """Null: servers without a stated tier, so without a price."""
    replicas: int | None = None
    """Null: the sweep's."""
    base_url: str | list[str] | None = None
    """Servers that are there already; null: they are started."""
    label: str | None = None
    """What the user calls this system; null: the sweep's own, or none."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        model = (self.model or "served model").rstrip("/").rsplit("/", 1)[-1]
        return f"{model} on {self.tier}" if self.tier else model


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """Load levels of one kind: numbers, or ranges like "1..64x2" (1, 2, 4 ... 64)."""

    request_rate: list[float | str] | str | None = None
    """Open loop: requests/s on average."""
    concurrency: list[int | str] | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSpec:
    """What was asked, as the sweep file says it; scenarios/sweep.example.toml explains every key."""

    trace: str
    loads: Loads
    models: list[str] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    pair: list[Pair] = field(default_factory=list)
    """Instead of ``models`` x ``tiers``: exactly these."""
    base_url: str | list[str] | dict[str, str | list[str]] | None = None
    """Servers that are there already: of the one tier, or a table with those of each tier."""
    replicas: int = 1
    repeats: int = 1
    seed: int | None = None
    """None: not stated; one is drawn when the sweep begins, for prompts that no server has seen."""
    order: Literal["random", "given", "abba"] = "random"
    """Of load levels and repeats within a pair. abba: two pairs in turns, A B B A, repeat after repeat, so that what
    drifts meets both alike (`harness compare`)."""
    on_failure: Literal["continue", "stop"] = "continue"
    """After a point that failed or is INVALID. A missed SLO is a result, not a failure."""
    budget_usd: float | None = None
    budget_hours: float | None = None
    """Hours of the clock in which servers are up."""
    options: dict[str, object] = field(default_factory=dict)
    """Every other key: an option of ``harness replay`` by its name."""

    @property
    def is_search(self) -> bool:
        return self.options.get("search") == "capacity"


KEYS = frozenset(f.name for f in fields(SweepSpec) if f.name != "options")


def read_sweep(path: Path, option_names: Collection[str], instead: Mapping[str, str]) -> SweepSpec:
    """The sweep file ``path``. Keys may be written with - or _; ``trace`` counts from the file's own folder.

    ``option_names``: what is taken into ``options`` as it is. ``instead``: for options that a sweep decides itself, the
    key to write instead.

    Raises `UsageError` with file and key for what is unknown, missing, of the wrong type or contradicts itself.
    """
    try:
        table = _normalise(read_toml(path), option_names, instead)
        own = {key: table.pop(key) for key in KEYS & table.keys()}
        spec = msgspec.convert({**own, "options": table}, SweepSpec)
        if spec.trace == "-":
            raise UsageError("trace: standard input can be read only once; name a file")
        if "://" not in spec.trace:
            spec = replace(spec, trace=str(path.resolve().parent / Path(spec.trace).expanduser()))
        _check(spec)
    except msgspec.ValidationError as e:
        problem, _, where = str(e).partition(" - at `$.")
        raise UsageError(f"{path}: {where.rstrip('`') + ': ' if where else ''}{problem}") from e
    except UsageError as e:
        raise UsageError(f"{path}: {str(e).removeprefix(f'{path}: ')}") from e
    return spec


def _normalise(raw: Table, option_names: Collection[str], instead: Mapping[str, str]) -> Table:
    table: Table = {}
    for written, value in raw.items():
        key = written.replace("-", "_")
        if key in instead:
            raise UsageError(f"{written}: in a sweep write {instead[key]}")
        if key not in KEYS and key not in option_names:
            raise unknown_name("key", written, {*KEYS, *option_names})
        if key in table:
            raise UsageError(f"{written}: given twice, with - and with _")
        table[key] = value
    pairs_given = table.get("pair")
    inner: list[tuple[str, Any, type[Loads | Pair]]] = [("loads", table.get("loads"), Loads)]
    inner += [("pair", one, Pair) for one in (pairs_given if isinstance(pairs_given, list) else [])]
    for where, value, kind in inner:
        names = {f.name for f in fields(kind)}
        for key in value if isinstance(value, dict) else ():
            if key not in names:
                raise UsageError(f"{where}: {unknown_name('key', key, names)}")
    return table


def _check(spec: SweepSpec) -> None:
    counts = [("repeats", spec.repeats), ("replicas", spec.replicas)]
    counts += [("pair.replicas", one.replicas) for one in spec.pair if one.replicas is not None]
    for name, count in counts:
        if count < 1:
            raise UsageError(f"{name}: is {count}, must be at least 1")
    if "\0" in spec.trace:
        raise UsageError(f"trace: {spec.trace!r} is no name of a file")
    for name, amount in (("budget_usd", spec.budget_usd), ("budget_hours", spec.budget_hours)):
        if amount is not None and not (math.isfinite(amount) and amount > 0):
            raise UsageError(f"{name}: is {amount:g}, must be above 0")
    if spec.order == "abba" and len(pairs(spec)) != 2:
        raise UsageError(f'order: "abba" is for two systems in turns, and here are {len(pairs(spec))}: name two')
    points = len(pairs(spec)) * len(levels(spec)) * spec.repeats
    if points > MOST_POINTS:
        raise UsageError(f"{points:,} runs are asked for, more than the {MOST_POINTS:,} a sweep can hold; make several")


def pairs(spec: SweepSpec) -> list[Pair]:
    """Every model on every tier, or the pairs given; replicas and addresses filled in. Raises `UsageError`."""
    if spec.pair:
        if spec.models or spec.tiers or spec.base_url is not None:
            raise UsageError("pair: instead of models, tiers and base_url, not beside them")
        found = list(spec.pair)
    else:
        urls = spec.base_url if isinstance(spec.base_url, dict) else {}
        for name in urls:
            if name not in spec.tiers:
                raise UsageError(f"base_url: {unknown_name('tier', name, spec.tiers)}")
        alone = None if isinstance(spec.base_url, dict) else spec.base_url
        if alone is not None and len(spec.tiers) > 1:
            raise UsageError(f"base_url: one for {len(spec.tiers)} tiers; write [base_url] with the addresses of each")
        models: Sequence[str | None] = spec.models or [None]
        tiers: Sequence[str | None] = spec.tiers or [None]
        found = [Pair(model=m, tier=t, base_url=urls.get(t or "", alone)) for m in models for t in tiers]
    for i, one in enumerate(found):
        if not one.base_urls and (one.model is None or one.tier is None):
            missing = "model" if one.model is None else "tier"
            raise UsageError(
                f"{'pair' if spec.pair else missing + 's'}: no {missing} for servers to be started: name one "
                f"('harness {missing}s' lists them), or the base_url of servers that are there"
            )
        if one in found[:i]:
            raise UsageError(f"{one.name}: named twice; repeats = 2 measures every point twice")
    return [replace(one, replicas=len(one.base_urls) or one.replicas or spec.replicas) for one in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One load level: exactly one of the two is set."""

    request_rate: float | None = None
    concurrency: int | None = None

    @property
    def label(self) -> str:
        """``rate4`` or ``c8``."""
        return f"c{self.concurrency}" if self.concurrency is not None else f"rate{self.request_rate:g}"

    @property
    def words(self) -> str:
        return f"{self.request_rate:g} req/s" if self.concurrency is None else f"{self.concurrency} in flight"


def levels(spec: SweepSpec) -> list[Level]:
    """Load levels in the order given, ranges written out. Raises `UsageError`."""
    rate, concurrency = spec.loads.request_rate, spec.loads.concurrency
    if (rate is None) == (concurrency is None):
        raise UsageError("loads: give request_rate (open loop) or concurrency (closed loop), one of the two")
    where = "loads.request_rate" if concurrency is None else "loads.concurrency"
    given = rate if rate is not None else concurrency or []
    values = [v for item in ([given] if isinstance(given, str) else given) for v in _range(where, item)]
    if concurrency is None:
        found = [Level(request_rate=float(v)) for v in values]
    elif any(v != int(v) for v in values):
        raise UsageError(f"{where}: requests in flight are whole numbers")
    else:
        found = [Level(concurrency=int(v)) for v in values]
    # Files are named by the label, which rounds: two levels must differ in it.
    if not found or len({level.label for level in found}) < len(found) or len(found) > MOST_LEVELS:
        raise UsageError(f"{where}: needs 1 to {MOST_LEVELS} different levels, has {len(found)}")
    return found


def _range(where: str, item: float | str) -> list[float]:
    if not isinstance(item, str):
        if not 0 < item < MOST_LOAD:
            raise UsageError(f"{where}: {item} is no load: must be above 0 and below {MOST_LOAD:g}")
        return [item]
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"\s*{number}\s*\.\.\s*{number}\s*x\s*{number}\s*", item)
    low, high, factor = map(float, match.groups()) if match else (0.0, 0.0, 0.0)
    sound = 0 < low <= high < MOST_LOAD and 1 < factor < MOST_LOAD
    steps = int(math.log(high / low) / math.log(factor) + 1e-9) if sound else MOST_LEVELS
    if steps >= MOST_LEVELS:
        raise UsageError(f'{where}: {item!r} is no range: write "first..last x factor", like "1..64x2"')
    return [low * factor**k for k in range(steps + 1)]


# --- points ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Point:
    """One run of a sweep: what it is, and what became of it."""

    name: str
    pair: int
    level: Level
    repeat: int
    """From 1."""
    seed: int
    """Of prompts, arrivals and hang-ups: another for every level and repeat, the same on every model and tier."""
    plan: str
    """File in ``plans/``."""
    state: Literal["pending", "running", "done", "failed", "skipped"] = "pending"
    """"done" whatever its verdict; "failed" has no whole run (``reason``); "skipped": the budget did not allow it."""
    verdict: str | None = None
    """VALID, INVALID or TOO SMALL once it is done."""
    slo_met: bool | None = None
    reason: str | None = None
    """Why it failed, was skipped, is INVALID, or is to be done again."""
    plan_sha256: str | None = None
    requests: int | None = None
    took_s: float | None = None
    """On the clock, from starting its load workers to its last row and counter."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """A few figures of its report, seconds, requests/s and USD."""


def seeded(spec: SweepSpec, begun: SweepSpec | None = None) -> SweepSpec:
    """The spec with a seed: its own, else that of the sweep which was ``begun``, else one that is drawn."""
    if spec.seed is not None:
        return spec
    return replace(spec, seed=drawn_seed() if begun is None else begun.seed)


def make_points(spec: SweepSpec) -> list[Point]:
    """Every point in the order of execution: pair after pair, inside a pair shuffled by the seed (or as given).

    Two load levels or repeats never share a seed (a warm prefix cache would answer the second one), while equal ones of
    all pairs do, so that they can be compared request by request.
    """
    points: list[Point] = []
    found = pairs(spec)
    source = {one: k for k, one in reversed(list(enumerate(_plan_source(one) for one in found)))}
    for k, level, repeat in _in_order(spec, found):
        pair = found[k]
        first = source[_plan_source(pair)]
        maker = f"{first:02d}-{slug(found[first].name)}"
        run = f"{level.label}-r{repeat}"
        points.append(
            Point(
                name=f"{len(points) + 1:03d}-{slug(pair.name)}-{run}", pair=k, level=level, repeat=repeat,
                seed=point_seed(spec.seed or 0, level, repeat), plan=f"{maker}-{run}.arrow",
            )
        )  # fmt: skip
    return points


def _in_order(spec: SweepSpec, found: Sequence[Pair]) -> Iterator[tuple[int, Level, int]]:
    repeats = range(1, spec.repeats + 1)
    if spec.order == "abba":
        for repeat in repeats:
            turn = [(k, level, repeat) for k in range(len(found)) for level in levels(spec)]
            yield from turn if repeat % 2 else reversed(turn)
        return
    for k, pair in enumerate(found):
        runs = [(k, level, repeat) for repeat in repeats for level in levels(spec)]
        if spec.order == "random":
            random.Random(f"{load_seed(spec.seed or 0)}/{pair.model}/{pair.tier}/{k}").shuffle(runs)
        yield from runs


def point_seed(seed: int, level: Level, repeat: int) -> int:
    """The seed of one level and repeat: its load 31 bits of a hash, so that no two sweeps' seeds are neighbours."""
    load = int.from_bytes(hashlib.sha256(f"{load_seed(seed)}/{level.label}/{repeat}".encode()).digest()[:4]) >> 1
    return with_load(seed, load)


def _plan_source(pair: Pair) -> tuple[Any, ...]:
    """Pairs that count tokens alike share plans: those of one model; a foreign server only with itself."""
    return (pair.model, *pair.base_urls)


def slug(text: str) -> str:
    """``text`` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace(" on ", "-")).strip("-.")[:50]
