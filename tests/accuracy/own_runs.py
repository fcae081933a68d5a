"""Runs of vLLM on this project's own machine (two CPU cores), and what a calibration foretells of them.

own-runs.npz holds the rows of the runs, reduced by ``python -m tests.accuracy.own_runs RUN...``; own-runs.json says
what each was. Of each model the numbers are fitted to two of the closed loops (1 and one more in flight), and every
other load is foretold. The run of Qwen3-32B is a stranger's (tests/golden/qwen.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from harness.cli.calibrate_model import load_of
from harness.cli.select_runs import find_runs, judged
from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.simulated import measured_engine
from harness.cluster.hardware.calibrating import linear_numbers
from harness.cluster.hardware.calibration import with_numbers
from harness.cluster.hardware.engine import HardwareEngine, engine_for
from harness.cluster.hardware.fit import Fit, Floats, Load, Number, fit, serve
from harness.cluster.hardware.kernels import KernelStep
from harness.cluster.simulator.vllm_limits import graph_sizes

HERE = Path(__file__).parent
ROWS, FACTS = HERE / "own-runs.npz", HERE / "own-runs.json"
ARRAYS = ("sent_s", "input_tokens", "output_tokens", "ttft_s", "decode_s", "finished_s")
SECOND = 16
"""Slots of the second load that is fitted."""
SHORT = {"sent_s": 4, "ttft_s": 4, "decode_s": 4, "finished_s": 4}
"""Decimals that are kept of a time in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """One load of one model: measured, and simulated with numbers from ``fitted_to``."""

    model: str
    load: str
    requests: int
    fitted_to: str
    """"itself" where it was one of those."""
    measured: tuple[float, float, float]
    """TTFT p50 and TPOT p50 in ms, output tokens/s."""
    simulated: tuple[float, float, float]

    @property
    def off(self) -> tuple[float, float, float]:
        """Relative errors of TTFT, TPOT and cost."""
        (first, gap, rate), (first0, gap0, rate0) = self.simulated, self.measured
        return first / first0 - 1, gap / gap0 - 1, rate0 / rate - 1


def keep(folders: Sequence[Path]) -> None:
    """Reduce runs to what is needed here."""
    arrays: dict[str, Any] = {}
    facts = []
    paths = find_runs(*folders)
    for path, (manifest, load) in zip(paths, judged(paths, load_of), strict=True):
        for name in ARRAYS:
            values = getattr(load, name)
            if name in SHORT:
                values = np.round(values - (load.sent_s[0] if name == "finished_s" else 0.0), SHORT[name])
            arrays[f"{len(facts)}-{name}"] = values.astype(np.float32 if name in SHORT else np.int32)
        facts.append({
            "run": path.name, "model": manifest.model, "tier": manifest.tier and manifest.tier.name,
            "concurrency": load.concurrency, "rate": manifest.plan.planned_rate if load.concurrency is None else None,
            "vllm": manifest.engine_version, "args": manifest.engine_args, "created": manifest.created,
            "cpu": manifest.host.cpu,
        })  # fmt: skip
    np.savez_compressed(ROWS, **arrays)
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@cache
def kept() -> list[tuple[dict[str, Any], Load]]:
    """Every run that was kept, and its facts."""
    found: list[tuple[dict[str, Any], Load]] = []
    if not ROWS.exists():
        return found
    with np.load(ROWS) as file:
        for k, one in enumerate(json.loads(FACTS.read_text(encoding="utf-8"))):
            values = {
                name: file[f"{k}-{name}"].astype(np.float64 if name in SHORT else np.int64) for name in ARRAYS
            }  # fmt: skip
            found.append((one, Load(name=one["run"], concurrency=one["concurrency"], **values)))
    return found


def models() -> list[str]:
    """Of the runs."""
    return list(dict.fromkeys(facts["model"] for facts, _ in kept()))


def slots(model: str) -> list[int]:
    """Of its closed loops, ascending."""
    return sorted({load.concurrency for facts, load in kept() if facts["model"] == model and load.concurrency})


@cache
def foretell(model: str, second: int) -> tuple[Fit, list[Foretold]]:
    """Numbers from 1 and ``second`` in flight, and every load of the model by them."""
    runs = [(facts, load) for facts, load in kept() if facts["model"] == model]
    facts = runs[0][0]
    bare = measured_engine(get_model(model), get_tier(facts["tier"]), facts["args"])
    build = partial(with_numbers, bare, "linear")
    chosen = [load for _, load in runs if load.concurrency in (1, second)]
    found = fit(chosen, build, linear_numbers(chosen))
    engine = build(found.values)
    return found, [_foretold(model, one, load, engine, (1, second)) for one, load in runs]


def _foretold(
    model: str, facts: Mapping[str, Any], load: Load, engine: HardwareEngine, fitted: Sequence[int]
) -> Foretold:
    found = serve(load, engine)
    took = [float(load.finished_s.max() - load.sent_s.min()), float(found.finished_s.max() - found.due_s.min())]
    slots = load.concurrency
    return Foretold(
        model=model, requests=len(load),
        load=f"{slots} in flight" if slots is not None else f"{facts['rate']:.3g} requests/s",
        fitted_to="itself" if slots in fitted else f"{fitted[0]} and {fitted[1]} in flight",
        measured=_three(load, load.ttft_s, load.decode_s, took[0]),
        simulated=_three(load, found.ttft_s, found.decode_s, took[1]),
    )  # fmt: skip


def _three(load: Load, ttft_s: Floats, decode_s: Floats, took_s: float) -> tuple[float, float, float]:
    there = np.isfinite(load.ttft_s) & np.isfinite(load.decode_s)
    gaps = decode_s[there] / (load.output_tokens[there] - 1)
    return float(np.median(ttft_s[there])) * 1e3, float(np.median(gaps)) * 1e3, load.output_tokens.sum() / took_s


# --- a stranger's run on tables of kernels ---------------------------------------------------------------------------

FIRST_S = 20.0
LABELS = ("TTFT mean", "p50", "p90", "p99", "TPOT mean", "p50", "p90", "p99", "duration")


def _qwen() -> tuple[Load, HardwareEngine]:
    """Qwen3-32B on two RTX PRO 6000 over PCIe, and the engine without a calibration. Times count from the queue."""
    rows = np.genfromtxt(
        HERE.parent / "golden" / "qwen3_32b_requests.csv", delimiter=",", names=True
    )  # fmt: skip
    rows = rows[np.argsort(rows["queued_s"], kind="stable")]
    start = rows["queued_s"].min()
    load = Load(
        name="Qwen3-32B", concurrency=None, sent_s=rows["queued_s"] - start,
        input_tokens=rows["input_tokens"].astype(np.int64), output_tokens=rows["output_tokens"].astype(np.int64),
        ttft_s=rows["first_token_s"] - rows["queued_s"], decode_s=rows["last_token_s"] - rows["first_token_s"],
        finished_s=rows["last_token_s"] - start,
    )  # fmt: skip
    engine = engine_for(get_model("qwen3-32b"), get_tier("aws-g7e.24xlarge"), tensor_parallel=2)
    limits = replace(engine.limits, max_num_seqs=128, max_num_batched_tokens=2048, prefix_cache=False)
    step = engine.step_time
    assert isinstance(step, KernelStep)
    step = KernelStep(step.tables, graph_sizes(limits, compute_capability=12), step.constants)
    return load, replace(engine, step_time=step, limits=limits, arrival_s=0.0, arrival_per_token_s=0.0)


def qwen_fit(numbers: Sequence[Number], **known: float) -> Fit:
    """What its first 20 s say: of the requests whose first token came by then, when it came. ``known``: the others."""
    load, engine = _qwen()
    early = load.sent_s + load.ttft_s <= FIRST_S
    seen = replace(
        load, ttft_s=np.where(early, load.ttft_s, np.nan), decode_s=np.where(load.finished_s <= FIRST_S, 1.0, np.nan)
    )  # fmt: skip
    assert np.isnan(seen.decode_s).all()
    found = fit([seen], lambda values: with_numbers(engine, "kernels", {**known, **values}), numbers)
    return replace(found, values={**known, **found.values})


def qwen_off(numbers: Mapping[str, float] | None) -> Floats:
    """Relative errors of `LABELS` over the whole run; None: without a calibration."""
    load, engine = _qwen()
    if numbers is not None:
        engine = with_numbers(engine, "kernels", numbers)
    found = serve(load, engine)

    def figures(ttft_s: Floats, decode_s: Floats, finished_s: Floats) -> Floats:
        gaps = decode_s / (load.output_tokens - 1)
        sides = [[one.mean(), *np.percentile(one, (50, 90, 99))] for one in (ttft_s, gaps)]
        return np.array([*sides[0], *sides[1], finished_s.max()])

    mine = figures(found.ttft_s, found.decode_s, found.finished_s)
    return np.asarray(mine / figures(load.ttft_s, load.decode_s, load.finished_s) - 1)


if __name__ == "__main__":
    keep([Path(one) for one in sys.argv[1:]])
