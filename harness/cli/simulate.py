"""Serve a trace on hardware that is not there: the run directory of a replay, made in virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from harness.cli.output import say
from harness.cli.replay import OUT_OPTION
from harness.cli.verb import EXIT_STATUS, TRACE_ARGUMENT, command, takes
from harness.errors import UsageError
from harness.option_types import FAIL, RANGE, SCALE_ON, opt, options_of
from harness.options import LoadOptions, PlanOptions, ReplayOptions, ReportOptions, RouterName, ServeOptions

if TYPE_CHECKING:
    from harness.cluster.simulator.elastic import Elastic


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticOptions:
    """How many servers there are, when, and which of them gets a request."""

    heading: ClassVar = "Servers"
    replicas: tuple[int, int] = opt(
        "Servers to simulate, each on a TIER of its own. A..B: an autoscaler keeps so many (--scale-on).", (1, 1),
        kind=RANGE, metavar="N|A..B",
    )  # fmt: skip
    router: RouterName = opt(
        "Which of several servers gets a request: the one with the fewest, each in turn, one for all of a session, or "
        "the one that was sent the longest part of the prompt before.", "least", kind=RouterName,
    )  # fmt: skip
    stale_s: float = opt(
        "How far apart the router asks servers how many requests they have, as one that scrapes metrics does.", 0.0,
    )  # fmt: skip
    scale_on: tuple[str, float] | None = opt(
        "What Kubernetes' autoscaler (HPA) goes by: requests that run or wait (in-flight), or wait, a server.",
        kind=SCALE_ON, metavar="GAUGE=NUMBER",
    )  # fmt: skip
    scale_every_s: float = opt("How far apart it decides.", 15.0)
    scale_down_after_s: float = opt("It gives back what no decision of so long wanted.", 300.0)
    start_s: float = opt("Start-up time of a server, from the request for it until it answers: an assumption.", 120.0)
    fail: float | tuple[tuple[int, float], ...] | None = opt(
        "Servers fail: the mean time between failures of one (4h), or which does when (0@300s,2@15m; numbers in the "
        "order in which they were started). Requests in flight are cut off, the cache is lost, another starts.",
        kind=FAIL, metavar="TIME|SERVER@TIME,...",
    )  # fmt: skip

    def elastic(self, seed: int) -> Elastic | None:
        """How the servers come and go; None: they stay. Raises `UsageError` for a range that nothing decides about."""
        from harness.cluster.simulator.elastic import Autoscaler, Elastic, Failures

        least, most = self.replicas
        if (least < most) != (self.scale_on is not None):
            raise UsageError("--replicas A..B and --scale-on GAUGE=NUMBER go together: between which, and by what")
        if self.scale_on is None and self.fail is None:
            return None
        scaling = None
        if self.scale_on is not None:
            gauge, target = self.scale_on
            scaling = Autoscaler(
                least=least, most=most, gauge="waiting" if gauge == "waiting" else "in flight", target=target,
                every_s=self.scale_every_s, hold_s=self.scale_down_after_s,
            )  # fmt: skip
        failures = Failures()
        if isinstance(self.fail, tuple):
            failures = Failures(at_s=[(at_s, server) for server, at_s in self.fail])
        elif self.fail is not None:
            failures = Failures(mean_s=self.fail, seed=seed)
        return Elastic(start_s=self.start_s, scaling=scaling, failures=failures)


@command(
    epilog=f"""\b
Examples:
  harness simulate trace.jsonl --model llama-3.1-8b-instruct --tier aws-p5.4xlarge --slo ttft=2s,tpot=50ms
  harness simulate trace.jsonl --model mistral-7b-instruct-v0.3 --tier aws-g6e.xlarge --rate 4 --replicas 2
  harness simulate day.jsonl --tier aws-p5.4xlarge --replicas 2..8 --scale-on in-flight=32 --start 3m --fail 12h

{EXIT_STATUS}""",
)
@TRACE_ARGUMENT
@takes(
    ReplayOptions,
    options_of(PlanOptions),
    options_of(ServeOptions, "model", "tier", "label", "step", "calibration"),
    options_of(LoadOptions, "concurrency", "slo", "min_requests"),
    options_of(ReportOptions),
)
@takes(ElasticOptions, to="how")
@OUT_OPTION
def simulate(trace: tuple[Path, ...], out: Path, asked: ReplayOptions, how: ElasticOptions) -> int:
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
    elastic = how.elastic(asked.plan.seed or 0)
    source = open_asked(trace, asked.plan)
    root, url = split_out(out)
    name = f"{source.path.name.split('.')[0]}-{asked.serve.label or f'{model.name}-on-{tier.name}'}-simulated"
    run = create_run_dir(root, name)
    say(f"run directory: {run.path}")
    with mirrored(url, run.path, say):
        make_bare_plan(source, run.plan, asked)
        subject = Subject(
            model=model, tier=tier, replicas=how.replicas[0], engine=engine, router=how.router, stale_s=how.stale_s,
            elastic=elastic,
        )  # fmt: skip
        simulate_plan(run, subject, asked)
    return report_run(run.path, asked.report, asked.load.slo)
