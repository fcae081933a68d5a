"""Closed-loop points of one model on one server, and vLLM's own client on the same: ``python -m tests.gpu.points``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from harness.cli.output import say
from harness.cli.runner.steps import execute_point, make_plan
from harness.cli.runner.targets import Servers, Target, choose_target
from harness.errors import HarnessError
from harness.options import LoadOptions, PlanOptions, ReplayOptions, ServeOptions
from harness.record.manifest import RunDir
from harness.trace.io import Trace, open_asked
from tests.bench.vllm_bench import run_vllm_bench
from tests.gpu.steps import PEER_AT, POINTS, REHEARSED_POINTS, is_complete

PEER = "vllm-client.json"


def options(asked: argparse.Namespace) -> ReplayOptions:
    virtual = asked.rehearse == "simulated"
    return ReplayOptions(
        plan=PlanOptions(seed=1),
        serve=ServeOptions(
            model=asked.model, tier=asked.tier, engine="simulated" if virtual else None,
            clock="virtual" if virtual else None,
        ),
        load=LoadOptions(min_requests=5),
    )  # fmt: skip


def plan(trace: Trace, run: RunDir, target: Target, one: ReplayOptions) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.plan.unlink(missing_ok=True)
    make_plan(trace, run.plan, target, one)


def peer(run: RunDir, servers: Servers, in_flight: int) -> None:
    """The same lengths in the same order, other prompts: those that the point sent are in the prefix cache."""
    run_vllm_bench(
        run.plan, run.path / PEER, base_url=servers.base_urls[0], model=servers.model, concurrency=in_flight,
        extra_body=servers.extra_body, api_key=servers.api_key, deadline_s=150,
    )  # fmt: skip


def main() -> int:
    """Every point that is not there yet; 1 when one could not be run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    for word in ("--model", "--tier", "--rehearse"):
        parser.add_argument(word)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    asked = parser.parse_args()
    points = [(n, max(n, int(count * asked.share))) for n, count in REHEARSED_POINTS.get(asked.rehearse, POINTS)]
    base = options(asked)
    trace, target = open_asked(asked.trace, base.plan), choose_target(base)
    todo = []
    for in_flight, requests in points:
        run = RunDir(asked.out / f"in-flight-{in_flight}")
        if is_complete(run.path):
            say(f"{run.path.name}: kept")
            continue
        one = replace(base.at(rate=None, concurrency=in_flight), plan=replace(base.plan, limit=requests))
        plan(trace, run, target, one)
        todo.append((run, one))
    other = RunDir(asked.out.parent / "vllm-client")
    at = PEER_AT[asked.rehearse]
    wanted = asked.rehearse != "simulated" and not (other.path / PEER).exists()
    if wanted:
        one = replace(base.at(rate=None, concurrency=at), plan=replace(base.plan, limit=dict(points)[at], seed=2))
        plan(trace, other, target, one)
    failed = 0
    if todo or wanted:
        home = RunDir(asked.out.parent / "servers")
        home.path.mkdir(parents=True, exist_ok=True)
        with target.open(home) as servers:
            for run, one in todo:
                try:
                    execute_point(run, servers, one, warm=True)
                except HarnessError as e:
                    failed += 1
                    say(f"{run.path.name}: {e}")
            if wanted:
                try:
                    peer(other, servers, at)
                except HarnessError as e:
                    failed += 1
                    say(f"vLLM's client: {e}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HarnessError as e:
        sys.exit(f"tests.gpu.points: {e}")
