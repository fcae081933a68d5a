"""Which tiers to look at before any is rented: by simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from harness.cli.documents import Advice, AdvisedTier, NotAdvised
from harness.cli.output import print_json, print_rows, say
from harness.cli.verb import EXIT_STATUS, JSON_OPTION, TRACE_ARGUMENT, command, takes
from harness.errors import EXIT_FAILURE, EXIT_VALID, UsageError
from harness.option_types import NEW_FILE, opt
from harness.options import AttainOption, ReadOptions

if TYPE_CHECKING:
    from harness.cluster.catalogue.models import Model
    from harness.cluster.hardware.advice import Offer
    from harness.cluster.hardware.calibration import ModelCalibration
    from harness.cluster.hardware.engine import HardwareEngine
    from harness.record.manifest import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviseOptions(AttainOption):
    """What is asked of the tiers."""

    heading: ClassVar = "Advice"
    models: tuple[str, ...] = opt("This model; repeat for several.", (), flag="--model", metavar="NAME")
    names: tuple[str, ...] = opt("Only this tier; repeat. Default: all with GPUs.", (), flag="--tier", metavar="NAME")
    slo: Mapping[str, float] | None = opt(
        "The SLO: ttft=2s,tpot=100ms of each request, or ttft_p99=2s,tpot_p95=80ms (also e2e).",
        metavar="KEY=TIME,...",
    )  # fmt: skip
    calibrations: tuple[str, ...] = opt(
        "Of a tier that was measured: what 'harness calibrate-model' wrote; repeat.", (), metavar="FILE"
    )
    sweep: Path | None = opt("Write the sweep that measures the two to this file.", kind=NEW_FILE)


@command(
    epilog=f"""\b
Examples:
  harness advise trace.jsonl --model mistral-7b-instruct-v0.3 --slo ttft=2s,tpot=100ms --attain 95%
  harness advise trace.jsonl --model llama-3.1-8b-instruct --model llama-3.1-8b-instruct-fp8 --slo ttft_p95=2s \\
      --sweep measure.toml

{EXIT_STATUS}""",
)
@TRACE_ARGUMENT
@takes(ReadOptions, to="reading")
@takes(AdviseOptions)
@JSON_OPTION
def advise(trace: tuple[Path, ...], format_: str, reading: ReadOptions, asked: AdviseOptions) -> int:
    """Rank tiers that nobody has rented yet by what MODEL costs there on TRACE at an SLO: simulated.

    vLLM's scheduler in virtual time, with step times from NVIDIA's measured kernels: each tier's capacity at the SLO
    with the cheapest split over its accelerators, and USD per 1M output tokens of a full instance, in the range of the
    model's own error (docs/ACCURACY.md). A tier that was measured takes its --calibration, and is shown beside what
    was measured. Tiers within 10 % are tied. Where only the data sheet is known the cost is
    "at least" that, and such a tier is never ranked. Says which two to measure, and with which sweep.
    """
    from harness.cli.calibrate_model import print_compared
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.catalogue.tiers import get_tier, list_tiers
    from harness.cluster.hardware.advice import demand_of, offers, ranked, to_measure
    from harness.cluster.hardware.calibration import read_model_calibration
    from harness.slo import criteria
    from harness.trace.io import open_trace

    if not asked.models or not asked.slo:
        raise UsageError("say which --model and which --slo, like ttft=2s,tpot=100ms")
    models = [get_model(name) for name in asked.models]
    measured = [read_model_calibration(Path(file)) for file in asked.calibrations]
    known = {one.tier for one in measured}
    tiers = [get_tier(name) for name in asked.names] or [
        tier for tier in list_tiers() if tier.accelerator or tier.name in known
    ]
    source = open_trace(trace, format=reading.trace_format, skip_bad=reading.skip_bad, sort=reading.sort)
    demand = demand_of(source)
    say(f"{len(models)} x {len(tiers)} models and tiers are simulated; a second or two for each kind of hardware")
    found, without = [], []
    for one in offers(models, tiers, demand, criteria(asked.slo, asked.attain), partial(_own, measured)):
        if isinstance(one, tuple):
            without.append(NotAdvised(model=one[0].name, tier=one[1].name, why=one[2]))
        else:
            found.append(one)
    groups = ranked(found)
    rows = [_row(offer, str(place)) for place, group in enumerate(groups, 1) for offer in group]
    bounds = sorted((one for one in found if one.is_bound), key=lambda one: one.usd_per_1m_output)
    rows += [_row(offer, None) for offer in bounds]
    two = to_measure(groups)
    sweep = _sweep(two, trace, asked) if two else None
    if sweep and asked.sweep:
        asked.sweep.write_text(sweep, encoding="utf-8")
    if format_ == "json":
        print_json(Advice(offers=rows, without=without, sweep=sweep, calibrations=measured))
    else:
        print_rows(
            [asdict(row) for row in rows],
            "rank model tier split requests_per_s usd_per_1m_output low high step_times note",
        )
        print("Simulated, not measured. Equal ranks are tied; without a rank: at least so many USD.")
        for line in without:
            print(f"  not {line.model} on {line.tier}: {line.why}")
        if sweep:
            print(f"Measure these two ({asked.sweep or '--sweep FILE writes it'}):\n\n{sweep}")
            print("With loads = { concurrency = [1, 8] } 'harness calibrate-model' then fits what their steps take.")
        for fitted in measured:
            print(f"\n{fitted.model} on {fitted.tier}: measured ({fitted.evidence}), simulated, and the fit")
            print_compared(fitted)
    return EXIT_VALID if rows else EXIT_FAILURE


def _own(measured: Sequence[ModelCalibration], model: Model, tier: Tier, parts: int | None) -> HardwareEngine | None:
    """The engine as one's own runs have it; None: there are none of it."""
    from harness.cluster.engines.simulated import measured_engine
    from harness.cluster.hardware.calibration import calibrated
    from harness.cluster.hardware.engine import engine_for

    for one in measured:
        if one.model == model.name:
            bare = measured_engine(model, tier, ()) if parts is None else engine_for(model, tier, tensor_parallel=parts)
            if one.fits(model.name, tier.name, bare) is None:
                return calibrated(bare, one)
    return None


def _row(offer: Offer, rank: str | None) -> AdvisedTier:
    engine, usd = offer.engine, offer.usd_per_1m_output
    notes = [engine.facts[key] for key in ("uncalibrated", "scaled", "not_kernels") if key in engine.facts]
    if offer.served < 1:
        notes.append(f"{1 - offer.served:.1%} of the requests do not fit into its context")
    split = f"{engine.tensor_parallel} x {offer.replicas}" if engine.tensor_parallel else None
    return AdvisedTier(
        rank=rank, model=offer.model, tier=offer.tier.name, split=split, requests_per_s=offer.requests_per_s,
        usd_per_1m_output=usd, low=usd * offer.error[0], high=None if offer.is_bound else usd * offer.error[1],
        step_times=engine.source, note="; ".join(notes),
    )  # fmt: skip


def _sweep(two: Sequence[Offer], trace: Sequence[Path], asked: AdviseOptions) -> str:
    """A sweep file that measures the offers, each from half of its simulated capacity to beyond it."""
    slo = ", ".join(f'{key} = "{limit * 1000:g}ms"' for key, limit in (asked.slo or {}).items())
    most = max(offer.requests_per_s for offer in two)
    least = min(offer.requests_per_s for offer in two)
    rates = sorted({float(f"{rate:.3g}") for rate in (least / 2, least * 0.9, least * 1.1, most * 0.9, most * 1.1)})
    pairs = "".join(
        f'\n[[pair]]\nmodel = "{offer.model}"\ntier = "{offer.tier.name}"\nreplicas = {offer.replicas}\n'
        for offer in two
    )
    return (
        f'trace = "{trace[0].resolve()}"\nloads = {{ request_rate = {rates} }}\nrepeats = 3\nslo = {{ {slo} }}\n'
        f"attain = {asked.attain:g}\nbudget_hours = 4.0\n{pairs}"
    )
