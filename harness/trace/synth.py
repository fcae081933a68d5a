"""Made-up traces: arrivals and lengths drawn from distributions, or from a ServeGen client model. All from a seed.

Distributions are given by name, like ``lognormal:mean=800,cv=1.2`` (cv: coefficient of variation) or ``constant:128``
(or ``128``); `_KINDS` has all with their parameters. Of the gaps between arrivals the mean comes from the rate:
``poisson`` (exponential gaps), ``constant``, ``gamma:cv=C``, ``weibull:shape=K`` (below 1 burstier than exponential).

**ServeGen** (alibaba/ServeGen) publishes no requests but a model per client: ``NAME-trace.csv`` has a line for each
window of 600 s (start, rate, coefficient of variation, ``Gamma`` or ``Weibull`` or nothing, shape, scale) and
``NAME-dataset.json`` the distributions of token lengths for each 6 h (as text that holds a Python dict; multimodal
models split the input into text, image, audio and video tokens, which are added). In each window a stationary renewal
process of the given family and shape is drawn at the window's mean rate; where no family was fitted, a Poisson process.
Input and output lengths are drawn independently, as the model has no joint distribution.
"""

from __future__ import annotations

import ast
import csv
import heapq
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.errors import TraceError, UsageError, unknown_name
from harness.trace.formats.record import MAX_TOKENS, TraceRecord
from harness.trace.source import open_source, unpack

Floats = npt.NDArray[np.float64]


def _lognormal(rng: np.random.Generator, n: int, mean: float, sigma2: float) -> Floats:
    return rng.lognormal(math.log(mean) - sigma2 / 2, math.sqrt(sigma2), n)


_Draw = Callable[[np.random.Generator, int, float, float], Floats]
_KINDS: dict[str, tuple[tuple[str, ...], _Draw]] = {
    "constant": (("value",), lambda rng, n, a, _: np.full(n, a)),
    "uniform": (("low", "high"), lambda rng, n, a, b: rng.uniform(a, b, n)),
    "exponential": (("mean",), lambda rng, n, a, _: rng.exponential(a, n)),
    "lognormal": (("mean", "cv"), lambda rng, n, a, b: _lognormal(rng, n, a, math.log1p(b**2))),
    "gamma": (("mean", "cv"), lambda rng, n, a, b: rng.gamma(1 / b**2, a * b**2, n)),
    "weibull": (("mean", "shape"), lambda rng, n, a, b: a / math.gamma(1 + 1 / b) * rng.weibull(b, n)),
}
"""Kind -> its parameters, and how ``n`` values are drawn with them."""
_ARRIVALS = {"poisson": "exponential", "constant": "constant", "gamma": "gamma", "weibull": "weibull"}
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """A distribution of positive numbers."""

    kind: str
    parameters: tuple[float, ...]

    def __str__(self) -> str:
        named = zip(_KINDS[self.kind][0], self.parameters, strict=True)
        return f"{self.kind}:" + ",".join(f"{name}={value:g}" for name, value in named)

    def draw(self, rng: np.random.Generator, n: int) -> Floats:
        a, b = (*self.parameters, 0.0)[:2]
        constant = self.kind in ("lognormal", "gamma") and not b  # no spread
        return _KINDS["constant" if constant else self.kind][1](rng, n, a, b)

    def draw_tokens(self, rng: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
        return np.clip(np.rint(self.draw(rng, n)), 1, MAX_TOKENS).astype(np.int64)


def parse_lengths(text: str) -> LengthDistribution:
    """The distribution of token lengths that ``text`` names. Raises `UsageError`."""
    kind, _, rest = text.strip().partition(":")
    if not rest and _number(kind) is not None:
        kind, rest = "constant", kind
    distribution = _parse(text, kind, rest, tuple(_KINDS), _KINDS[kind][0] if kind in _KINDS else ())
    if distribution.draw(np.random.default_rng(0), 1)[0] > MAX_TOKENS:
        raise UsageError(f"{text!r}: lengths above {MAX_TOKENS} tokens")
    return distribution


def parse_arrivals(text: str, rate: float) -> LengthDistribution:
    """The distribution of gaps, seconds, with mean 1 / ``rate``, that ``text`` names. Raises `UsageError`."""
    kind, _, rest = text.strip().partition(":")
    names = _KINDS[_ARRIVALS[kind]][0] if kind in _ARRIVALS else ()
    wanted = tuple(name for name in names if name not in ("mean", "value"))
    shape = _parse(text, kind, rest, tuple(_ARRIVALS), wanted)
    return LengthDistribution(_ARRIVALS[kind], (1 / rate, *shape.parameters))


def _parse(text: str, kind: str, rest: str, kinds: tuple[str, ...], wanted: tuple[str, ...]) -> LengthDistribution:
    if kind not in kinds:
        raise unknown_name("distribution", kind, kinds)
    values: dict[str, float] = {}
    for part in rest.split(",") if rest else ():
        name, _, number = part.strip().rpartition("=")
        value = _number(number)
        # One parameter needs no name.
        name = name or (wanted[0] if len(wanted) == 1 else "")
        if name not in wanted or name in values or value is None:
            raise UsageError(f"{text!r}: {_expected(kind, wanted)}")
        values[name] = value
    low_enough = {"cv": 0.0, "low": 0.0}
    if set(values) != set(wanted) or any(v < 0 or (not v and n not in low_enough) for n, v in values.items()):
        raise UsageError(f"{text!r}: {_expected(kind, wanted)}, above 0")
    if kind == "uniform" and values["low"] > values["high"]:
        raise UsageError(f"{text!r}: low is above high")
    if values.get("shape", 1.0) < 0.1 or values.get("cv", 1.0) > 100:
        raise UsageError(f"{text!r}: too extreme to be drawn from (shape at least 0.1, cv at most 100)")
    return LengthDistribution(kind, tuple(values[name] for name in wanted))


def _expected(kind: str, wanted: tuple[str, ...]) -> str:
    return "expected " + (f"{kind}:{','.join(f'{name}=NUMBER' for name in wanted)}" if wanted else f"only {kind!r}")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def draw_lengths(
    input_tokens: LengthDistribution, output_tokens: LengthDistribution, seed: int
) -> Callable[[], Callable[[], tuple[int, int]]]:
    """For `harness.trace.io.open_trace`: each call begins the same sequence of (input, output) tokens anew."""

    def start() -> Callable[[], tuple[int, int]]:
        rng = np.random.default_rng(seed)
        waiting: list[tuple[int, int]] = []

        def draw() -> tuple[int, int]:
            if not waiting:
                into, out = input_tokens.draw_tokens(rng, _BATCH), output_tokens.draw_tokens(rng, _BATCH)
                waiting.extend(zip(into.tolist()[::-1], out.tolist()[::-1], strict=True))
            return waiting.pop()

        return draw

    return start


_MAX_MODEL_BYTES = 256 * 2**20


DAY_S, TROUGH_S = 86_400.0, 4 * 3600.0
Lengths = Callable[[np.random.Generator, int], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
"""Input and output tokens of so many requests."""


def drawn_apart(input_tokens: LengthDistribution, output_tokens: LengthDistribution) -> Lengths:
    """Both lengths of a request drawn each by itself."""
    return lambda rng, n: (input_tokens.draw_tokens(rng, n), output_tokens.draw_tokens(rng, n))


def drawn_like(records: Iterable[TraceRecord]) -> Lengths:
    """Both lengths of a request of the trace, drawn with replacement. Raises `UsageError` where one says none."""
    pairs = [(one.input_tokens, one.output_tokens) for one in records]
    if not pairs or any(None in pair for pair in pairs):
        raise UsageError("--like: a trace whose requests all say how many tokens went in and came out")
    whole = np.array(pairs, dtype=np.int64)

    def draw(rng: np.random.Generator, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        chosen = whole[rng.integers(len(whole), size=n)]
        return chosen[:, 0], chosen[:, 1]

    return draw


def daily(peak: float) -> Callable[[Floats], Floats]:
    """From seconds at a steady rate to seconds of days whose busiest moment has ``peak`` times that rate.

    The rate is a cosine of the time of day, lowest at 4 h and highest at 16 h: its mean stays. Raises `UsageError`
    unless ``peak`` is from 1 to 2, where the trough has none left.
    """
    if not 1 <= peak <= 2:
        raise UsageError(f"--peak {peak:g}: the busiest moment over the mean of a day is from 1 to 2")
    at_s = np.linspace(0.0, DAY_S, 1441)
    turn = 2 * np.pi / DAY_S
    come_s = at_s - (peak - 1) / turn * (np.sin(turn * (at_s - TROUGH_S)) + np.sin(turn * TROUGH_S))

    def warp(steady_s: Floats) -> Floats:
        days, rest_s = np.divmod(steady_s, DAY_S)
        warped: Floats = days * DAY_S + np.interp(rest_s, come_s, at_s)
        return warped

    return warp


def synthesize(
    *, gaps: LengthDistribution, lengths: Lengths, requests: int | None, duration_s: float | None, seed: int,
    warp: Callable[[Floats], Floats] | None = None,
) -> Iterator[TraceRecord]:  # fmt: skip
    """Requests with these gaps (s) and lengths, the first at 0, until there are ``requests`` or ``duration_s`` is over.

    ``warp``: of their times (`daily`); None: as they are. Raises `UsageError` when neither end is given.
    """
    if requests is None and duration_s is None:
        raise UsageError("say where the trace ends: --requests or --duration")
    rng = np.random.default_rng(seed)
    made, now_s = 0, 0.0
    while requests is None or made < requests:
        times = now_s + np.concatenate([[0.0], np.cumsum(gaps.draw(rng, _BATCH))])
        into, out = lengths(rng, _BATCH)
        placed = times[:-1] if warp is None else warp(times[:-1])
        for arrival_s, i, o in zip(placed.tolist(), into.tolist(), out.tolist(), strict=True):
            if (duration_s is not None and arrival_s >= duration_s) or made == requests:
                return
            made += 1
            yield TraceRecord(round(arrival_s * 1e9), i, o, line=made)
        now_s = float(times[-1])


# --- ServeGen ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Window:
    start_s: float
    end_s: float
    rate: float
    family: str
    shape: float


_Pmf = tuple[Floats, Floats]
"""Values and their probabilities."""
_Steps = list[tuple[float, tuple[list[_Pmf], _Pmf] | None]]
"""From when, and the lengths of inputs, which are added up, and of outputs; None: an idle time."""


@dataclass(slots=True)
class ServeGen:
    """A pool of ServeGen clients; iterate `draw`."""

    clients: dict[str, tuple[list[_Window], _Steps]]
    without_lengths: int = 0
    """Requests left out so far because the model has no lengths for their time."""
    without_family: int = 0
    """Windows so far whose gaps have no fitted family: drawn as Poisson."""

    @property
    def span_s(self) -> tuple[float, float]:
        windows = [window for windows, _ in self.clients.values() for window in windows]
        return min(w.start_s for w in windows), max(w.end_s for w in windows)

    def draw(self, start_s: float, end_s: float, seed: int) -> Iterator[TraceRecord]:
        """Requests of all clients from ``start_s`` to ``end_s`` of the model's clock, by arrival, the first at 0.

        Each request's ``session_id`` is None: the model has no conversations.
        """
        streams = [
            self._client(client, start_s, end_s, np.random.default_rng([seed, i]))
            for i, client in enumerate(self.clients.values())
        ]
        first_s: float | None = None
        for made, (arrival_s, into, out) in enumerate(heapq.merge(*streams), start=1):
            first_s = arrival_s if first_s is None else first_s
            yield TraceRecord(round((arrival_s - first_s) * 1e9), into, out, line=made)

    def _client(
        self, client: tuple[list[_Window], _Steps], start_s: float, end_s: float, rng: np.random.Generator
    ) -> Iterator[tuple[float, int, int]]:
        windows, steps = client
        for window in windows:
            if window.end_s <= start_s or window.start_s >= end_s or window.rate <= 0:
                continue
            self.without_family += not window.family
            times = _arrivals(window, rng)
            times = times[(times >= start_s) & (times < end_s)]
            now = next((step for at, step in reversed(steps) if at <= window.start_s), None)
            if now is None:
                self.without_lengths += len(times)
                continue
            inputs, output = now
            into = sum((rng.choice(values, len(times), p=p) for values, p in inputs), np.zeros(len(times)))
            out = rng.choice(output[0], len(times), p=output[1])
            counts = np.clip(np.rint([into, out]), 1, MAX_TOKENS).astype(np.int64)
            yield from zip(times.tolist(), counts[0].tolist(), counts[1].tolist(), strict=True)


def _arrivals(window: _Window, rng: np.random.Generator) -> Floats:
    """Arrival times of a stationary renewal process: its first gap is a length-biased one, cut at a random place."""
    k, length, mean = window.shape, window.end_s - window.start_s, 1 / window.rate
    gaps: Callable[[int], Floats]
    if window.family == "Weibull":
        scale = mean / math.gamma(1 + 1 / k)
        first, gaps = scale * rng.gamma(1 + 1 / k) ** (1 / k), lambda n: scale * rng.weibull(k, n)
    elif window.family == "Gamma":
        first, gaps = rng.gamma(k + 1, mean / k), lambda n: rng.gamma(k, mean / k, n)
    else:
        first, gaps = rng.gamma(2, mean), lambda n: rng.exponential(mean, n)
    times = [np.array([first * rng.random()])]
    while times[-1][-1] < length:
        times.append(times[-1][-1] + np.cumsum(gaps(int(window.rate * length) + 16)))
    found: Floats = np.concatenate(times)
    return window.start_s + found[found < length]


def read_servegen(path: Path) -> ServeGen:
    """The clients in a folder of ``*-trace.csv`` and ``*-dataset.json`` pairs (plain or compressed), or of one pair.

    Raises `TraceError` for files that are missing or not as described.
    """
    if path.is_dir():
        traces = sorted(f for f in path.iterdir() if re.search(r"-trace\.csv(\.gz|\.zst)?$", f.name))
        if not traces:
            raise TraceError(str(path), None, "no ServeGen client in this folder: expected NAME-trace.csv")
    else:
        traces = [path.with_name(re.sub(r"-dataset\.json", "-trace.csv", path.name))]
    clients = {}
    for trace in traces:
        stem = re.sub(r"-trace\.csv(\.gz|\.zst)?$", "", trace.name)
        names = (f"{stem}-dataset.json{suffix}" for suffix in ("", ".gz", ".zst"))
        dataset = next((file for name in names if (file := trace.with_name(name)).is_file()), None)
        if stem == trace.name or dataset is None:
            raise TraceError(str(trace), None, f"a ServeGen client is a pair: no {stem}-dataset.json beside it")
        clients[stem] = (_windows(trace), _steps(dataset))
    return ServeGen(clients)


def _windows(file: Path) -> list[_Window]:
    found: list[tuple[float, float, str, float]] = []
    for line, row in enumerate(csv.reader(io.StringIO(_text(file))), start=1):
        try:
            start_s, rate, family, shape = float(row[0]), float(row[1]), row[3], float(row[4])
        except (ValueError, IndexError):
            raise TraceError(str(file), line, f"expected start,rate,cv,family,shape,scale, found {row}") from None
        good = all(math.isfinite(x) for x in (start_s, rate, shape)) and start_s >= 0 and 0 <= rate < 1e6
        if not good or family not in ("", "Gamma", "Weibull") or (family and shape < 0.01):
            raise TraceError(str(file), line, f"not a window of a ServeGen client: {row}")
        if found and start_s <= found[-1][0]:
            raise TraceError(str(file), line, "this window does not begin after the one above")
        found.append((start_s, rate, family, shape))
    if len(found) < 2:
        raise TraceError(str(file), None, "fewer than two windows: their length is not known")
    starts = [window[0] for window in found]
    ends = [*starts[1:], 2 * starts[-1] - starts[-2]]
    return [_Window(window[0], end_s, *window[1:]) for window, end_s in zip(found, ends, strict=True)]


def _steps(file: Path) -> _Steps:
    steps: _Steps = []
    try:
        for start, fields in sorted(json.loads(_text(file)).items(), key=lambda item: float(item[0])):
            names = ("input_tokens",) if "input_tokens" in fields else tuple(
                f"{kind}_tokens" for kind in ("text", "image", "audio", "video")
            )  # fmt: skip
            *inputs, output = (_probabilities(fields[name]) for name in (*names, "output_tokens"))
            known = [pmf for pmf in inputs if pmf is not None]
            steps.append((float(start), (known, output) if output and len(known) == len(inputs) else None))
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError) as e:
        raise TraceError(str(file), None, f"not the lengths of a ServeGen client ({type(e).__name__}: {e})") from None
    return steps


def _probabilities(text: str) -> _Pmf | None:
    """(values, probabilities) of a Python dict as text; None when it is empty (an idle time)."""
    pairs = ast.literal_eval(text)
    values, weights = (np.array(list(side), dtype=np.float64) for side in (pairs.keys(), pairs.values()))
    if not len(values):
        return None
    if not (np.isfinite(values).all() and (values >= 0).all() and (weights >= 0).all()):
        raise ValueError("a length or a probability is negative or no number")
    if not 0.99 < weights.sum() < 1.01:
        raise ValueError(f"probabilities add up to {weights.sum():g}")
    return values, weights / weights.sum()


def _text(file: Path) -> str:
    raw = unpack(open_source(file), _MAX_MODEL_BYTES)
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise TraceError(str(file), None, f"not UTF-8 ({e.reason})") from None
