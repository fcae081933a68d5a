"""Runs the steps, each to its archive: ``python -m tests.gpu [--tier NAME] [--budget 20m] [--rehearse simulated|cpu]``.

A step whose archive says that it ended is not run again; what another one left in ``--work`` is gone on with. Archives
of 16 MiB at most hold rows, samples of the servers, the GPU and the machine, logs, versions and a table (step.json).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.cluster.catalogue.tiers import get_tier, write_tiers
from harness.cluster.process.process import Process
from harness.errors import HarnessError
from harness.option_types import parse_duration
from harness.record.host import describe_host, git_commit, installed_versions
from harness.record.manifest import MANIFEST, Tier, now_utc, read_manifest
from tests.bench.crosscheck import their_figures
from tests.gpu.points import PEER
from tests.gpu.steps import LIMIT_S, ROOT, STEPS, Ask, Step

ARCHIVE_BYTES = 16 << 20
CLOSING_S = 45.0
"""Of the limit of a step, for the end of what runs and the archive."""
EXPENDABLE = ("plan.arrow", "*.log", "server-processor-*.arrows", "host-*.arrows")
"""Left out of an archive in this order while it is too large: a plan can be made again from its seed."""


def run_step(step: Step, ask: Ask, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run its commands one after the other, within the limit in all; what became of it."""
    folder = ask.work / step.name
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    said: dict[str, Any] = {
        "step": step.name, "says": step.says, "rehearsed": ask.rehearse, "started": now_utc(), "outcome": "done",
        "tier": asdict(get_tier(ask.tier)), "host": asdict(describe_host()), "versions": installed_versions(),
        "commit": git_commit(), "commands": [],
    }  # fmt: skip
    for k, argv in enumerate(step.commands(ask, folder)):
        left = limit_s - CLOSING_S - (time.monotonic() - began)
        log = folder / f"command-{k + 1}.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        code = None
        if left > 0:
            print(f"  {' '.join(argv[2:6] if argv[0] == sys.executable else argv)} ...", flush=True)
            with Process.start(argv, name=step.name, env={"PYTHONPATH": str(ROOT)}, log=log) as process:
                code = process.wait(left)
                if code is None:
                    process.stop(CLOSING_S - 15)
        took = time.monotonic() - started
        said["commands"].append({"argv": argv, "exit": code, "took_s": took})
        if code is None:
            said["outcome"] = "cut"
        elif code not in (0, 3, 4, 5) and said["outcome"] == "done":  # those are verdicts
            said["outcome"] = "failed"
    said["rows"] = list(rows(folder))
    said["took_s"] = time.monotonic() - began
    (folder / "step.json").write_text(json.dumps(said, indent=1))
    return said


def as_here(tier: Tier) -> Tier:
    """The tier with the processors and the memory of this host: a lent or partitioned machine has others than the
    instance whose price it is, and servers are not placed on half of its memory.
    """
    host = describe_host()
    note = (
        f"processors and memory are this host's; the instance of this price has {tier.vcpu} and {tier.memory_gib:g} GiB"
    )
    notes = "; ".join(filter(None, (tier.note, note)))
    return replace(tier, vcpu=host.cores, memory_gib=host.memory_gib, ownership=None, note=notes)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A row of the table for every run below, and for vLLM's own client."""
    for path in sorted(folder.rglob(MANIFEST)):
        run = path.parent
        try:
            manifest, found = read_manifest(run), summarise(read_run(run))
        except HarnessError as e:
            yield {"run": run.name, "verdict": f"unreadable: {str(e).splitlines()[0]}"}
            continue
        rates, times = found.rates, found.metrics
        yield {
            "run": run.name, "client": "harness", "evidence": manifest.evidence, "model": manifest.model,
            "tier": manifest.tier.name if manifest.tier else None, "in_flight": manifest.spec.concurrency,
            "verdict": found.verdict, "reasons": list(found.reasons),
            "requests": found.requests.succeeded, "request_throughput": rates.request_throughput.value,
            "output_token_throughput": rates.output_token_throughput.value,
            "service_ttft_p50_s": times.service_ttft.p50.value, "service_ttft_p95_s": times.service_ttft.p95.value,
            "tpot_p50_s": times.tpot.p50.value, "tpot_p95_s": times.tpot.p95.value,
            "usd_per_1m_total": found.cost.usd_per_1m_total.value,
        }  # fmt: skip
    for path in folder.rglob(PEER):
        figures = their_figures(json.loads(path.read_text()))
        yield {
            "run": path.parent.name, "client": "vllm bench serve", "verdict": None,
            **{name: figures.get(name) for name in ("request_throughput", "output_token_throughput")},
            **{f"{name}_s": seconds(figures.get(name)) for name in ("service_ttft_p50", "tpot_p50")},
        }  # fmt: skip


def seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def pack(folder: Path, archive: Path, most: int = ARCHIVE_BYTES) -> list[str]:
    """Write the archive of a step; the patterns that were left out so that it fits."""
    for k in range(len(EXPENDABLE) + 1):
        gone = EXPENDABLE[:k]
        partial = archive.with_suffix(".partial")
        with tarfile.open(partial, "w:xz", preset=3) as out:
            for path in sorted(folder.rglob("*")):
                unwanted = path.name == "api-key" or any(path.match(pattern) for pattern in gone)
                if path.is_file() and not path.is_symlink() and not unwanted:
                    out.add(path, f"{folder.name}/{path.relative_to(folder)}")
        if partial.stat().st_size <= most:
            partial.replace(archive)
            return list(gone)
        partial.unlink()
    raise HarnessError(f"{folder}: its rows alone are larger than {most >> 20} MiB")


def outcome(archive: Path) -> dict[str, Any] | None:
    """What an archive says of its step; null without one."""
    try:
        with tarfile.open(archive) as found:
            file = found.extractfile(f"{archive.name.partition('.')[0]}/step.json")
            return None if file is None else dict(json.loads(file.read()))
    except (OSError, tarfile.TarError, KeyError, ValueError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """0: every step that was begun ended; 1: one failed or was cut."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--tier", default="runpod-h200", help="whose dated price is paid ('harness tiers')")
    parser.add_argument("--budget", default="2h", help="stop after the last step that fits")
    parser.add_argument("--rehearse", choices=["simulated", "cpu"], help="the same steps without a GPU")
    parser.add_argument("--only", nargs="*", help="steps, by the number they begin with")
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu"), help="folder of the archives")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of the runs")
    asked = parser.parse_args(argv)
    budget = parse_duration(asked.budget)
    if budget is None:
        parser.error(f"--budget {asked.budget}: write 20m")
    ask = Ask(tier=asked.tier, work=asked.work.absolute(), rehearse=asked.rehearse)
    for folder in (asked.out, ask.work):
        folder.mkdir(parents=True, exist_ok=True)
    tier = get_tier(ask.tier)
    if ask.rehearse is None:
        write_tiers(own := ask.work / "tiers.toml", [as_here(tier)])
        os.environ["HARNESS_TIERS"] = str(own)
    began, results, left = time.monotonic(), [], []
    for step in STEPS:
        if asked.only and step.name.partition("-")[0] not in asked.only:
            continue
        archive = asked.out / f"{step.name}.tar.xz"
        said = outcome(archive)
        if said is not None and said["outcome"] == "done" and said["rehearsed"] == ask.rehearse:
            print(f"{step.name}: kept, from {said['started']}")
            results.append(said)
            continue
        remains = budget - (time.monotonic() - began)
        if left or step.minutes * 60 > remains:
            left.append(step)
            continue
        print(f"{step.name}: {step.says}", flush=True)
        said = run_step(step, ask, min(LIMIT_S, remains))
        gone = pack(ask.work / step.name, archive)
        without = f", without {', '.join(gone)}" if gone else ""
        size = f"{archive.stat().st_size / 2**20:.1f} MiB"
        print(f"{step.name}: {said['outcome']} in {said['took_s']:.0f} s, {size}{without}")
        results.append(said)
    show(results)
    for step in left:
        print(f"left: {step.name} ({step.minutes:g} min): {step.says}")
    return 1 if any(said["outcome"] != "done" for said in results) else 0


def show(results: Sequence[dict[str, Any]]) -> None:
    """The table of all steps."""
    if any(said["rehearsed"] for said in results):
        print("REHEARSED: no figure is of a GPU")
    print("step | run | verdict | evidence | req/s | output tokens/s | TTFT p50 s | TPOT p50 ms | USD per 1M")
    for said in results:
        for row in sorted(said["rows"], key=lambda row: row.get("in_flight") or 0):
            tpot = row.get("tpot_p50_s")
            cells = [row.get("request_throughput"), row.get("output_token_throughput"), row.get("service_ttft_p50_s"),
                     None if tpot is None else tpot * 1e3, row.get("usd_per_1m_total")]  # fmt: skip
            figures = " | ".join("-" if cell is None else f"{cell:.4g}" for cell in cells)
            print(f"{said['step']} | {row['run']} | {row['verdict']} | {row.get('evidence')} | {figures}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (HarnessError, subprocess.SubprocessError) as e:
        sys.exit(f"tests.gpu: {e}")
