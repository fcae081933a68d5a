"""Serve a trace on hardware that is not there: the run directory of a replay, made in virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from harness.cli.output import say
from harness.cli.replay import OUT_OPTION
from harness.cli.verb import EXIT_STATUS, TRACE_ARGUMENT, command, takes
from harness.errors import UsageError
from harness.option_types import opt, options_of
from harness.options import LoadOptions, PlanOptions, ReplayOptions, ReportOptions, RouterName, ServeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """Which of several servers gets a request."""

    heading: ClassVar = "Servers"
    router: RouterName = opt(
        "Which of several servers gets a request: the one with the fewest, each in turn, one for all of a session, or "
        "the one that was sent the longest part of the prompt before.", "least", kind=RouterName,
    )  # fmt: skip
    stale_s: float = opt(
        "How far apart the router asks servers how many requests they have, as one that scrapes metrics does.", 0.0,
    )  # fmt: skip


@command(
    epilog=f"""\b
Examples:
  harness simulate trace.jsonl --model llama-3.1-8b-instruct --tier aws-p5.4xlarge --slo ttft=2s,tpot=50ms
  harness simulate trace.jsonl --model mistral-7b-instruct-v0.3 --tier aws-g6e.xlarge --rate 4 --replicas 2

{EXIT_STATUS}""",
)
@TRACE_ARGUMENT
@takes(
    ReplayOptions,
    options_of(PlanOptions),
    options_of(
        ServeOptions,
        "model",
        "tier",
        "label",
        "step",
        "calibration",
        replicas="Servers to simulate; one rents one TIER.",
    ),
    options_of(LoadOptions, "concurrency", "slo", "min_requests"),
    options_of(ReportOptions),
)
@takes(RouterOptions, to="how")
@OUT_OPTION
def simulate(trace: tuple[Path, ...], out: Path, asked: ReplayOptions, how: RouterOptions) -> int:
    """Serve TRACE by a model on a tier without either: no server, no GPU, no waiting.

    vLLM's scheduler is run in virtual time, with the limits that it chooses for the device, its KV cache and prefix
    cache; a step takes what is known of the model's kernels on it. The run directory is that of a replay, and report,
    price and compare read it: every figure says that it is simulated. Not simulated: disaggregated prefill,
    speculative decoding, LoRA, sliding windows, pipeline and expert parallelism.
    """
    from harness.cli.results import report_run
    from harness.cli.runner.targets import asked_calibration
    from harness.cli.simulation import Subject, make_bare_plan, simulate_plan
    from harness.cluster.catalogue.models import DEFAULT_MODEL, get_model
    from harness.cluster.catalogue.tiers import get_tier
    from harness.cluster.engines.simulated import simulated_engine
    from harness.cluster.simulator.step_time import LinearStep
    from harness.record.manifest import create_run_dir
    from harness.store.copies import split_out
    from harness.store.follow import mirrored
    from harness.trace.io import open_asked

    asked.check()
    if asked.serve.tier is None:
        raise UsageError("which hardware? --tier NAME ('harness tiers' lists them)")
    model, tier = get_model(asked.serve.model or DEFAULT_MODEL), get_tier(asked.serve.tier)
    step = None if asked.serve.step is None else LinearStep(*asked.serve.step)
    engine = simulated_engine(model, tier, step, asked_calibration(asked.serve))
    source = open_asked(trace, asked.plan)
    root, url = split_out(out)
    name = f"{source.path.name.split('.')[0]}-{asked.serve.label or f'{model.name}-on-{tier.name}'}-simulated"
    run = create_run_dir(root, name)
    say(f"run directory: {run.path}")
    with mirrored(url, run.path, say):
        make_bare_plan(source, run.plan, asked)
        subject = Subject(
            model=model, tier=tier, replicas=asked.serve.replicas, engine=engine, router=how.router, stale_s=how.stale_s
        )  # fmt: skip
        simulate_plan(run, subject, asked)
    return report_run(run.path, asked.report, asked.load.slo)
