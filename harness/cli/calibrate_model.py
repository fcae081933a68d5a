"""Fit what a step of an engine takes to runs of it, for simulations of the same model on the same hardware."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.output import print_json, print_rows, say
from harness.cli.select_runs import find_runs, judged
from harness.cli.verb import EXIT_STATUS, JSON_OPTION, command
from harness.errors import EXIT_VALID, UsageError
from harness.option_types import NEW_FILE, PATH

if TYPE_CHECKING:
    from harness.analysis.arrays import Floats
    from harness.analysis.rows.read import Run
    from harness.analysis.summary import Summary
    from harness.cluster.hardware.calibration import ModelCalibration
    from harness.cluster.hardware.fit import Load
    from harness.record.manifest import RunManifest

MOST_CACHED = 0.02
"""Of the prompt tokens, read from a prefix cache."""
MOST_REQUESTS = 3000
"""Of each run, the first ones: more take long to simulate and tell little more."""
SAME: dict[str, Callable[[RunManifest], object]] = {
    "evidence": lambda run: run.evidence,
    "model": lambda run: run.model,
    "weights": lambda run: run.model_facts.get("sha256") or run.model_facts.get("source"),
    "tier": lambda run: run.tier and run.tier.name,
    "engine": lambda run: run.engine,
    "engine version": lambda run: run.engine_version,
    "engine arguments": lambda run: tuple(run.engine_args),
    "number of servers": lambda run: len(run.replicas),
}
"""What runs of one calibration have in common."""


@command(
    epilog=f"""\b
Examples:
  harness calibrate-model sweeps/20261122T021500Z-sweep
  harness calibrate-model runs/*-c1 runs/*-c8 -o mine.json
  harness simulate trace.jsonl --model smollm2-135m --tier aws-m7a.large --calibration mine.json

{EXIT_STATUS}""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("-o", "--out", type=NEW_FILE, help="File to write. Default: MODEL-on-TIER.calibration.json here.")
@JSON_OPTION
def calibrate_model(runs: tuple[Path, ...], out: Path | None, format_: str) -> int:
    """Fit what a step takes to measured RUNs of one model on one tier, by simulating them.

    Two loads at least, one of them a closed loop of 1 ('harness sweep' with concurrency = [1, 8] makes both on one
    server). On a chip with tables of kernels: a factor for them, one for steps that read prompts, and the host's time
    for each sequence. On others, such as a CPU: what a step takes by itself, for each sequence, prompt token and token
    of context. A number that the runs do not tell is left as it was, and said. Each load but that of 1 is also foretold
    by the others. The file is for --calibration of simulate, advise, and --engine simulated.
    """
    from harness.cluster.hardware.calibration import write_model_calibration

    found = calibration_of(find_runs(*runs))
    file = out or Path(f"{found.model.rsplit('/', 1)[-1]}-on-{found.tier}.calibration.json")
    write_model_calibration(file, found)
    if format_ == "json":
        print_json(found)
    else:
        print_calibration(found)
    say(f"calibration: {file}")
    return EXIT_VALID


def calibration_of(paths: Sequence[Path]) -> ModelCalibration:
    """Fitted to these runs. Raises `UsageError` for runs that are not sound, not of one system, or tell too little."""
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.engines.simulated import measured_engine
    from harness.cluster.hardware.calibrating import calibrate
    from harness.cluster.hardware.calibration import ModelCalibration, SourceRun
    from harness.record.manifest import RunDir, now_utc

    both = judged(paths, load_of)
    manifests = [manifest for manifest, _ in both]
    for what, value in SAME.items():
        values = list(dict.fromkeys(value(manifest) for manifest in manifests))
        if len(values) > 1:
            raise UsageError(f"the runs differ in {what} ({values[0]!r}, {values[1]!r}): calibrate each by itself")
    first = manifests[0]
    if first.tier is None:
        raise UsageError(f"{first.run_id}: no tier is known of its server; say --tier when it is measured")
    engine = measured_engine(get_model(first.model), first.tier, first.engine_args)
    say(f"{sum(len(load) for _, load in both):,} requests of {len(both)} runs are simulated again and again")
    done = calibrate([load for _, load in both], engine, first.tier.usd_per_hour)
    return ModelCalibration(
        created=now_utc(), model=first.model, tier=first.tier.name, chip=engine.chip,
        tensor_parallel=engine.tensor_parallel, engine_version=first.engine_version, evidence=first.evidence,
        kind=done.kind, numbers=done.found.values, errors=done.found.errors,
        not_told={name: error if math.isfinite(error) else None for name, error in done.found.not_told.items()},
        condition=done.found.condition,
        runs=[SourceRun(name=path.name, sha256=_sha256(RunDir(path).all_results())) for path in paths],
        loads=done.loads,
    )  # fmt: skip


def load_of(run: Run, summary: Summary) -> tuple[RunManifest, Load]:
    """What a fit needs of a run. Raises `UsageError` for one that is not VALID."""
    import numpy as np

    from harness.analysis.metrics import clumped
    from harness.cluster.hardware.fit import Load

    manifest, rows, warm = run.manifest, run.rows, run.warmup
    if summary.verdict != "VALID":
        raise UsageError(f"{run.path}: {summary.verdict} ({'; '.join(summary.reasons)}): nothing is fitted to it")

    def joined(name: str) -> Floats:
        return np.concatenate([np.asarray(getattr(part, name), dtype=np.float64) for part in (warm, rows)])

    counts = np.concatenate([np.zeros(len(warm), np.bool_), ~clumped(rows)])
    sent, tokens, inputs = joined("sent_s"), joined("output_tokens"), joined("input_tokens")
    good = (joined("error") < 0) & np.isfinite(sent) & (tokens >= 1) & np.isfinite(inputs)
    order = np.flatnonzero(good)[np.argsort(sent[good], kind="stable")][:MOST_REQUESTS]
    cached = float(np.nansum(joined("cached_tokens")[order]) / max(1.0, inputs[order].sum()))
    if cached > MOST_CACHED:
        raise UsageError(
            f"{run.path}: {cached:.0%} of the prompts were read from a prefix cache, so nobody knows what its steps "
            "read: run prompts that no run before it had"
        )
    return manifest, Load(
        name=run.path.name, concurrency=manifest.spec.concurrency if manifest.spec.mode == "closed" else None,
        sent_s=sent[order] - sent[order].min(), input_tokens=inputs[order].astype(np.int64),
        output_tokens=tokens[order].astype(np.int64), finished_s=joined("finished_s")[order] - sent[order].min(),
        ttft_s=np.where(counts, joined("first_gap_s"), np.nan)[order],
        decode_s=np.where(counts & (tokens > 1), joined("decode_s"), np.nan)[order],
        replicas=max(1, len(manifest.replicas)),
    )  # fmt: skip


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def print_calibration(found: ModelCalibration) -> None:
    """The numbers with their standard errors, and measured beside simulated."""
    from harness.cluster.hardware.calibrating import advice

    numbers = [
        {"number": name, "value": value, "standard_error": f"{found.errors[name]:.1%}"}
        for name, value in found.numbers.items()
        if name in found.errors
    ]
    print_rows(numbers, "number value standard_error")
    for line in advice(found.not_told):
        print(f"  {line}")
    print(f"Condition number {found.condition:.0f}; {found.kind} step, {found.model} on {found.chip}.")
    print_compared(found)


def print_compared(found: ModelCalibration) -> None:
    """Measured, simulated and fitted figures of every load."""
    print_rows(compared_rows(found), "load figures requests ttft_p50_ms tpot_p50_ms tokens_per_s usd_per_1m_output off")
    print("off: of TTFT, TPOT and cost.")
    if all(load.held_out is None for load in found.loads):
        print("No load could be left out of the fit: with a third, each would be foretold by the others.")


def compared_rows(found: ModelCalibration) -> list[dict[str, object]]:
    """Measured, simulated and fitted figures of every load; ``off``: of TTFT, TPOT and cost."""
    rows: list[dict[str, object]] = []
    for load in found.loads:
        sides = {
            "measured": load.measured, "simulated": load.uncalibrated, "fitted": load.fitted,
            "foretold by the others": load.held_out,
        }  # fmt: skip
        for name, one in sides.items():
            if one is None:
                continue
            off = ""
            if one is not load.measured:
                pairs = [(one.ttft_p50_s, load.measured.ttft_p50_s), (one.tpot_p50_s, load.measured.tpot_p50_s),
                         (load.measured.output_tokens_per_s, one.output_tokens_per_s)]  # fmt: skip
                off = " / ".join(f"{100 * (a / b - 1):+.1f} %" for a, b in pairs if a and b)
            rows.append({
                "load": load.load, "figures": name, "requests": load.requests,
                "ttft_p50_ms": one.ttft_p50_s * 1e3, "tpot_p50_ms": one.tpot_p50_s and one.tpot_p50_s * 1e3,
                "tokens_per_s": one.output_tokens_per_s, "usd_per_1m_output": one.usd_per_1m_output, "off": off,
            })  # fmt: skip
    return rows
