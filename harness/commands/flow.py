"""The flow: trace -> plan -> servers -> load -> rows -> report."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from harness.cli.output import print_json, say
from harness.cli.runner.steps import StopRequest, copy_plan, execute, make_plan
from harness.cli.runner.targets import API_KEY, Target, choose_target
from harness.commands.reports import report
from harness.errors import EXIT_VALID, ServerError
from harness.options import ReplayOptions, ServeOptions
from harness.plan.file import read_plan_info
from harness.record.manifest import PLAN, RunDir, create_run_dir
from harness.store.copies import local_copy, output_file, split_out
from harness.store.follow import mirrored
from harness.store.objects import as_url, is_url
from harness.trace.files import Files, open_asked


def replay(trace: Files, out: Path, options: ReplayOptions) -> int:
    """Plan, serve, run, report."""
    options.check()
    source = open_asked(trace, options.plan)
    target = choose_target(options)
    root, url = split_out(out)
    run = create_run_dir(root, f"{source.path.name.split('.')[0]}-{options.serve.label or target.label}")
    say(f"run directory: {run.path}")
    try:
        make_plan(source, run.plan, target, options)
    except BaseException:
        with suppress(OSError):
            run.path.rmdir()  # nothing is in it: no run was begun
        raise
    return run_and_report(run, target, options, url)


def plan(trace: Files, output: Path, options: ReplayOptions) -> int:
    """Trace -> plan file."""
    options.check_plan()
    source = open_asked(trace, options.plan)
    with output_file(output) as path:
        info = make_plan(source, path, choose_target(options), options)
    if options.report.format_ == "json":
        print_json(info)
    else:
        print(as_url(output) if is_url(output) else output)
    return EXIT_VALID


def run(plan: Path, out: Path, options: ReplayOptions) -> int:
    """Plan file -> run directory and report."""
    plan = local_copy(plan, say)
    info = read_plan_info(plan)
    options.check_run(plan, planned_closed=info.arrivals == "closed")
    target = choose_target(options)
    root, url = split_out(out)
    run_dir = create_run_dir(root, f"{plan.stem}-{options.serve.label or target.label}")
    say(f"run directory: {run_dir.path}")
    copy_plan(plan, run_dir.path / PLAN)
    return run_and_report(run_dir, target, options, url)


def serve(out: Path, options: ServeOptions) -> int:
    """Start servers, keep them until asked to stop."""
    asked = ReplayOptions(serve=options)
    asked.check()
    target = choose_target(asked)
    run_dir = create_run_dir(out, f"serve-{target.label}")
    stop = StopRequest()
    with target.open(run_dir) as servers, stop:
        if os.environ.get(API_KEY):
            say(f"API key: as in {API_KEY}")
        elif servers.api_key:
            key_file = run_dir.path / "api-key"
            key_file.touch(mode=0o600)
            key_file.write_text(servers.api_key)
            say(f"API key: export {API_KEY}=$(cat {key_file})")
        say(f"model {servers.model}; logs in {run_dir.path}; Ctrl-C ends the servers")
        for url in servers.base_urls:
            print(url, flush=True)
        while not stop.asked:
            time.sleep(0.5)
            for index, how in servers.check().items():
                log = Path(servers.replicas[index].log or "")
                raise ServerError(f"replica {index} is gone: {how}; see {log}")
    say("servers ended")
    return EXIT_VALID


def run_and_report(run: RunDir, target: Target, options: ReplayOptions, url: str | None) -> int:
    """Send the plan of ``run`` to ``target``, write the record (also to ``url``), print the report."""
    with mirrored(url, run.path, say):
        execute(run, target, options)
    slo, shown = options.load.slo, options.report
    return report([run.path], shown.format_, None if slo is None else dict(slo), shown.attain, shown.ratio)
