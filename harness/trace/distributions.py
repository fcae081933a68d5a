"""Random lengths and gaps by name: ``lognormal:mean=800,cv=1.2``, ``constant:128``, ``poisson``, ``gamma:cv=2`` ...

==============================  ======================================================================================
``constant:N`` (or ``N``)       always N
``uniform:low=A,high=B``        evenly between A and B
``exponential:mean=M``          memoryless
``lognormal:mean=M,cv=C``       mean M, coefficient of variation (standard deviation / mean) C: most token lengths
``gamma:mean=M,cv=C``           the same two, with a lighter tail
``weibull:mean=M,shape=K``      shape below 1 is burstier than exponential
==============================  ======================================================================================

For the gaps between arrivals the mean comes from the rate: ``poisson`` (exponential gaps), ``constant``,
``gamma:cv=C``, ``weibull:shape=K``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError, unknown_name
from harness.trace.formats.record import MAX_TOKENS

Floats = npt.NDArray[np.float64]

_PARAMETERS = {
    "constant": ("value",),
    "uniform": ("low", "high"),
    "exponential": ("mean",),
    "lognormal": ("mean", "cv"),
    "gamma": ("mean", "cv"),
    "weibull": ("mean", "shape"),
}
_ARRIVALS = {"poisson": "exponential", "constant": "constant", "gamma": "gamma", "weibull": "weibull"}
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution of positive numbers."""

    kind: str
    parameters: tuple[float, ...]
    """In the order of the module docstring."""

    def __str__(self) -> str:
        named = zip(_PARAMETERS[self.kind], self.parameters, strict=True)
        return f"{self.kind}:" + ",".join(f"{name}={value:g}" for name, value in named)

    def draw(self, rng: np.random.Generator, n: int) -> Floats:
        """``n`` independent values."""
        a, b = (*self.parameters, 0.0)[:2]
        if self.kind == "constant":
            return np.full(n, a)
        if self.kind == "uniform":
            return rng.uniform(a, b, n)
        if self.kind == "exponential":
            return rng.exponential(a, n)
        if self.kind == "weibull":
            return a / math.gamma(1 + 1 / b) * rng.weibull(b, n)
        if not b:
            return np.full(n, a)
        if self.kind == "gamma":
            return rng.gamma(1 / b**2, a * b**2, n)
        sigma2 = math.log1p(b**2)
        return rng.lognormal(math.log(a) - sigma2 / 2, math.sqrt(sigma2), n)

    def draw_tokens(self, rng: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
        """``n`` token counts: rounded, at least 1."""
        return np.clip(np.rint(self.draw(rng, n)), 1, MAX_TOKENS).astype(np.int64)


def parse_lengths(text: str) -> Distribution:
    """The distribution of token lengths that ``text`` names. Raises `UsageError`."""
    kind, _, rest = text.strip().partition(":")
    if not rest and _number(kind) is not None:
        kind, rest = "constant", kind
    distribution = _parse(text, kind, rest, tuple(_PARAMETERS), _PARAMETERS.get(kind, ()))
    if distribution.draw(np.random.default_rng(0), 1)[0] > MAX_TOKENS:
        raise UsageError(f"{text!r}: lengths above {MAX_TOKENS} tokens")
    return distribution


def parse_arrivals(text: str, rate: float) -> Distribution:
    """The distribution of gaps, seconds, with mean 1 / ``rate``, that ``text`` names. Raises `UsageError`."""
    kind, _, rest = text.strip().partition(":")
    wanted = tuple(name for name in _PARAMETERS.get(_ARRIVALS.get(kind, ""), ()) if name not in ("mean", "value"))
    shape = _parse(text, kind, rest, tuple(_ARRIVALS), wanted)
    return Distribution(_ARRIVALS[kind], (1 / rate, *shape.parameters))


def _parse(text: str, kind: str, rest: str, kinds: tuple[str, ...], wanted: tuple[str, ...]) -> Distribution:
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
    return Distribution(kind, tuple(values[name] for name in wanted))


def _expected(kind: str, wanted: tuple[str, ...]) -> str:
    return "expected " + (f"{kind}:{','.join(f'{name}=NUMBER' for name in wanted)}" if wanted else f"only {kind!r}")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def draw_lengths(
    input_tokens: Distribution, output_tokens: Distribution, seed: int
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
