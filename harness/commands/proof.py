"""The load generator proves itself: what it can carry here, and whether another client sees the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from harness.access import AUTHORIZATION
from harness.commands.catalogue import hot_path
from harness.commands.output import print_json, print_table, say
from harness.commands.steps import check_load_options, choose_endpoint, copy_plan, execute, output_lengths
from harness.commands.targets import UrlTarget, choose_target
from harness.errors import (
    EXIT_VALID,
    UsageError,
)
from harness.headers import parse_headers
from harness.plan import read_plan_columns, read_plan_info
from harness.run import PRIVATE, RunDir, create_run_dir


def crosscheck(plan: Path, out: Path, repeats: int, format_: str, **options: Any) -> int:
    """The same plan with our client and with vLLM's, in turn, and both sides' figures."""
    from analysis.against.crosscheck import compare, our_figures, their_figures, without_role_chunk
    from analysis.load import read_run
    from analysis.summary import summarise
    from cluster.vllm_bench import check_can_run, run_vllm_bench

    check_can_run()
    if read_plan_info(plan).arrivals == "closed" and not options["concurrency"]:
        raise UsageError(f"{plan} is planned for a closed loop, without times: say --concurrency N")
    endpoint = choose_endpoint(options["endpoint"], plan)
    notes = beyond_vllm(plan, endpoint)
    options.setdefault("warmup", None)
    options.setdefault("attain", 1.0)  # of no SLO
    check_load_options({**options, "speed": None, "rate": None})
    check_their_client(options)
    target = choose_target(options)
    if not isinstance(target, UrlTarget) or len(target.base_urls) != 1:
        raise UsageError("the cross-check sends to one server that is there: give its --base-url (see harness serve)")
    folder = create_run_dir(out, f"crosscheck-{target.label}").path
    say(f"folder: {folder}")
    ours, theirs, completed = [], [], []

    def run_ours(name: str) -> Any:
        run = RunDir(folder / name)
        run.path.mkdir(mode=PRIVATE)
        copy_plan(plan, run.plan)
        execute(run, target, options)
        return summarise(read_run(run.path))

    say("first our client once, uncounted: it leaves the server's prefix cache as every later run finds it")
    run_ours("first")
    for k in range(repeats):
        found: dict[str, Any] = {}
        for side in ("harness", "vllm") if k % 2 == 0 else ("vllm", "harness"):  # neither always comes after the other
            say(f"repeat {k + 1} of {repeats}: {side}")
            if side == "harness":
                found[side] = run_ours(f"harness-{k}")
            else:
                found[side] = run_vllm_bench(
                    plan, folder / f"vllm-{k}.json", base_url=target.base_urls[0], model=target.model,
                    concurrency=options["concurrency"], extra_body=options["extra_body"], api_key=target.api_key,
                    endpoint=endpoint, headers=parse_headers(options["headers"]),
                )  # fmt: skip
        summary, result = found["harness"], found["vllm"]
        if endpoint == "chat":
            result, note = without_role_chunk(result)
            notes += [note] if k == 0 else []
        ours.append(our_figures(summary))
        theirs.append(their_figures(result))
        completed.append((summary.requests.succeeded, int(result.get("completed", 0))))
        if summary.verdict != "VALID":
            notes.append(f"our run {k + 1} is {summary.verdict}: {'; '.join(summary.reasons)}")
    check = compare(ours, theirs, completed, notes)
    (folder / "crosscheck.json").write_bytes(msgspec.json.format(msgspec.json.encode(check), indent=2) + b"\n")
    if format_ == "json":
        print_json(check)
    else:
        print_table(
            ("figure", "unit", "harness", "vllm bench", "difference", "noise (95 %)", ""),
            [
                (f.name, f.unit, f"{f.ours:.3f}", f"{f.theirs:.3f}", f"{f.difference:+.3f}", f"{f.noise:.3f}",
                 f.verdict.upper() if f.verdict == "differ" else f.verdict)
                for f in check.figures
            ],
        )  # fmt: skip
        for why in dict.fromkeys(f.why for f in check.figures if f.why):
            names = ", ".join(f.name for f in check.figures if f.why == why)
            print(f"{names}: {why}")
        for note in check.notes:
            print(f"note: {note}")
        print(folder / "crosscheck.json")
    return EXIT_VALID


def check_their_client(options: dict[str, Any]) -> None:
    """Raise `UsageError` for what vLLM's client cannot be told."""
    lengths = (options["length_field"], output_lengths(options))
    if options["key_header"] != AUTHORIZATION or lengths != ("max_tokens", "forced"):
        raise UsageError(
            "vLLM's client sends a bearer and forces lengths in max_tokens: the cross-check takes no --key-header, "
            "--length-field or --output-lengths"
        )


def beyond_vllm(plan: Path, endpoint: str) -> list[str]:
    """What of this plan vLLM's client does not do. Raises `UsageError` where the two could not ask for the same."""
    if read_plan_info(plan).conversation == "live":
        raise UsageError(
            f"{plan} is a live conversation: its prompts follow from the answers of each run, so no two clients send "
            "the same; plan it with --conversation recorded"
        )
    columns = read_plan_columns(plan, ["output_tokens", "after", "cancel_after_ns", "timeout_ns"])
    if endpoint == "chat" and (missing := columns["output_tokens"].null_count):
        raise UsageError(
            f"{plan}: {missing} requests do not say how many tokens to generate, which vLLM's client must be told: use "
            "a trace with output_tokens ('harness trace convert --tokenizer FILE' counts recorded answers)"
        )
    said = {
        "after": "wait for the turn before them", "cancel_after_ns": "hang up",
        "timeout_ns": "have a time limit of their own",
    }  # fmt: skip
    counted = {name: len(columns) - columns[name].null_count for name in said}
    return [f"{n} requests {said[name]}, which vLLM's client does not do" for name, n in counted.items() if n]


def calibrate(format_: str) -> int:
    """Measure what one load worker on this machine can carry, and keep it for the planner."""
    from cluster.calibrate import calibrate as measure
    from harness.calibration import write_calibration
    from harness.paths import cache_dir

    found = measure(say, hot_path=hot_path())
    path = write_calibration(cache_dir(), found)
    if format_ == "json":
        print_json(found)
        return EXIT_VALID
    least = {True: "at least ", False: ""}
    print_table(
        ("one load worker here", "figure", "how"),
        [
            ("events/s", f"{least[found.events_at_least]}{found.events_per_s:,.0f}",
             f"streams of 100 tokens/s, {found.events_cpu_share:.0%} of a core"),
            ("requests/s", f"{least[found.requests_at_least]}{found.requests_per_s:,.0f}", "closed loop, 4 tokens"),
            ("lag p50 / p99", f"{found.lag_p50_s * 1e3:.2f} / {found.lag_p99_s * 1e3:.2f} ms", "Poisson, 500 req/s"),
            ("TTFT error p50 / p99", f"{found.ttft_error_p50_s * 1e3:+.2f} / {found.ttft_error_p99_s * 1e3:+.2f} ms",
             f"at {found.timing_events_per_s:,.0f} events/s, less the server's own"),
            ("ITL error p50 / p99", f"{found.itl_error_p50_s * 1e3:+.2f} / {found.itl_error_p99_s * 1e3:+.2f} ms",
             "there, less the server's own"),
            ("CPU per event", f"{found.cpu_us_per_event:.1f} us", "there"),
        ],
    )  # fmt: skip
    for note in found.notes:
        print(f"note: {note}")
    if found.events_at_least or found.requests_at_least:
        print('"at least": the known-truth server, not the worker, was the limit, or no limit was met')
    print(f"{path} ({found.took_s:.0f} s)")
    return EXIT_VALID
