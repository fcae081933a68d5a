"""Sweeps from the command line to the folder: shared servers, failures, budgets, Ctrl-C and kill -9 at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, StartServer, descendants, gone, harness, wait_for

from harness.cli.results import compare
from harness.cli.runner import sweep as sweep_run
from harness.cli.runner.targets import Servers, UrlTarget
from harness.cli.select_runs import sides_of_sweep
from harness.cli.sweep import sweep
from harness.cluster.deploy import load_workers as load
from harness.errors import HarnessError, ResultsError, ServerError, UsageError
from harness.plan.file import plan_sha256, read_plan_columns
from harness.record.manifest import Restart, RunDir, RunManifest, read_manifest
from harness.server import warmup
from harness.sweep import cost as sweep_cost
from harness.sweep.state import SweepState, read_state, verify

LEAD_S = 0.2
"""Load starts this long after the order, not a second: tiny points on one machine."""

COMMAND = f"""
import harness.cluster.deploy.load_workers
harness.cluster.deploy.load_workers.LEAD_S = {LEAD_S}
from harness.cli import cli, main
from harness.cli.results import compare
from harness.cli.sweep import sweep
cli.add_command(sweep)
main()
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LEAD_S", LEAD_S)


DONE = (0, 3)
JUDGED = ("VALID", "INVALID")
"""Whether a point is VALID is for `analysis` to say, and on a busy machine some are not; here it has to be said."""


def start(*args: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "sweep", *map(str, args)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(*args: str | Path) -> Result:
    """In this process: errors are in ``exception``."""
    return CliRunner().invoke(sweep, [str(arg) for arg in args], standalone_mode=False)


def go(*args: str | Path) -> Result:
    """`run`, and every point is done."""
    result = run(*args)
    assert result.return_value in DONE, f"{result.output}\n{result.exception!r}"
    return result


def write_sweep(
    tmp_path: Path,
    url: str | None,
    *,
    rows: int = 6,
    tokens: int = 4,
    loads: str = "concurrency = [1, 2]",
    more: str = "",
) -> Path:
    rows_text = (
        json.dumps({"arrival_s": i / 10, "input_tokens": 12, "output_tokens": tokens}) + "\n" for i in range(rows)
    )
    (tmp_path / "trace.jsonl").write_text("".join(rows_text))
    file = tmp_path / "tiny.toml"
    where = "" if url is None else f'tiers = ["aws-m7a.large"]\nbase_url = "{url}"\n'
    file.write_text(f'trace = "trace.jsonl"\nmin_requests = 1\nloads = {{ {loads} }}\n{where}{more}')
    return file


def folder_of(out: Path) -> Path:
    (folder,) = (path for path in out.iterdir() if not path.name.startswith("."))
    return folder


def check_whole(folder: Path, points: int) -> SweepState:
    """Every point done, whole, sent exactly as planned, and of its own seed."""
    state = read_state(folder)
    assert [p.state for p in state.points] == ["done"] * points
    for point in state.points:
        assert verify(folder, point) is None
        assert point.verdict in JUDGED, point.reason
        manifest = read_manifest(folder / point.name)
        assert manifest.plan.seed == point.seed
        assert manifest.spec.concurrency == point.level.concurrency
    return state


def test_a_sweep_of_two_levels_and_two_repeats(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.005", "--itl", "0.001")
    file = write_sweep(tmp_path, server.url, more='repeats = 2\nslo = {ttft = "2s"}\nattain = 0.5\nbudget_usd = 1.0\n')
    out = tmp_path / "sweeps"

    looked = run(file, "--dry-run", "--format", "json", "--out", out)
    assert looked.exit_code == 0, looked.exception
    assert not out.exists()
    planned = json.loads(looked.stdout)
    assert len(planned["runs"]) == 4
    assert planned["usd"] == pytest.approx(0.11592 * planned["hours"])
    assert planned["fits"]

    done = start(file, "--out", out)
    stdout, stderr = done.communicate(timeout=120)
    assert done.returncode in DONE, stderr
    assert stdout.count("VALID SLO met") == 4
    folder = folder_of(out)
    state = check_whole(folder, 4)
    assert len(server.truth()) == 24, "each request once, and nothing besides"
    (rental,) = state.rentals
    assert rental.tier is not None
    assert (rental.tier.date, rental.tier.usd_per_hour) == ("2026-01", 0.11592)
    assert rental.ended_s is not None
    assert rental.ended_s - rental.started_s > sum(p.took_s or 0 for p in state.points)
    prompts = [read_plan_columns(RunDir(folder / p.name).plan, ["prompt_token_ids"]).to_pylist() for p in state.points]
    texts = [str(row) for rows in prompts for row in rows]
    assert len(set(texts)) == len(texts), "no prompt is sent twice to a warm server"
    assert sum(f"[{k}/4]" in stderr for k in range(1, 5)) == 4
    assert "of 1 USD" in stderr
    assert stderr.count("load worker") <= 2, "what points have in common is said once"

    page = tmp_path / "page.html"
    reported = harness("report", folder, "--html", page)
    assert reported.returncode in DONE, reported.stderr
    assert page.read_text().count("c2-r1") > 0

    again = run(file, "--out", out, "--resume")
    assert again.return_value == done.returncode, again.exception
    assert len(server.truth()) == 24, "what is whole is not sent again"


def test_what_is_not_whole_is_done_again_and_nothing_is_deleted(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    file = write_sweep(tmp_path, server.url)
    out = tmp_path / "sweeps"
    go(file, "--out", out)
    folder = folder_of(out)
    torn, kept = (RunDir(folder / p.name) for p in read_state(folder).points)
    rows = torn.results(0).read_bytes()
    torn.results(0).write_bytes(rows[: len(rows) // 2])
    # The other one was whole when the harness died, but not yet written down as done.
    text = (folder / "sweep.json").read_text()
    assert text.count('"state": "done"') == 2
    head, tail = text.rsplit('"state": "done"', 1)
    (folder / "sweep.json").write_text(f'{head}"state": "running"{tail}')
    before = kept.results(0).stat()

    go("--resume", folder)
    check_whole(folder, 2)
    after = kept.results(0).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    aside = torn.path.with_name(f"{torn.path.name}.aborted-1")
    assert (aside / "results-0.arrows").read_bytes() == rows[: len(rows) // 2]
    assert len(server.truth()) == 18


def test_a_damaged_plan_is_made_again_and_is_the_same(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    go(write_sweep(tmp_path, server.url, loads="concurrency = [1]"), "--out", tmp_path / "sweeps")
    folder = folder_of(tmp_path / "sweeps")
    (point,) = read_state(folder).points
    plan = folder / "plans" / point.plan
    plan.write_bytes(plan.read_bytes()[:-9])  # one inode with that of the run
    resumed = go("--resume", folder)
    assert "made again" in resumed.output
    check_whole(folder, 1)
    assert plan_sha256(plan) == point.plan_sha256

    text = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(text.replace(point.plan_sha256 or "", "0" * 64))
    refused = run("--resume", folder)
    assert refused.return_value == 1
    (failed,) = read_state(folder).points
    assert "comes out otherwise" in (failed.reason or "")
    assert (failed.state, failed.verdict, failed.figures) == ("failed", None, {}), "nothing is left of the run it was"


def test_another_sweep_is_refused_with_the_difference(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    file = write_sweep(tmp_path, server.url, loads="concurrency = [1]", more="budget_usd = 1\n")
    out = tmp_path / "sweeps"
    go(file, "--out", out)
    folder = folder_of(out)
    asked = file.read_text()

    file.write_text(asked + "repeats = 2\nlimit = 3\n")
    refused = run(file, "--resume", folder)
    assert isinstance(refused.exception, UsageError)
    for words in ("repeats: 1 -> 2", "limit: not given -> 3"):
        assert words in str(refused.exception)

    file.write_text(asked.replace("budget_usd = 1", "budget_usd = 2"))
    go(file, "--resume", folder)  # a budget changes no point
    assert read_state(folder).spec.budget_usd == 2

    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}\n')
    refused = run("--resume", folder)
    assert isinstance(refused.exception, UsageError)
    assert "SHA-256" in str(refused.exception)
    assert isinstance(run("--resume", tmp_path).exception, ResultsError)
    assert isinstance(run().exception, UsageError)


def test_a_pair_that_fails_does_not_stop_the_others(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    dead = "http://127.0.0.1:9/v1"
    more = f'[[pair]]\nbase_url = "{dead}"\n[[pair]]\nbase_url = "{server.url}"\n'
    file = write_sweep(tmp_path, None, loads="concurrency = [1]", more=more)
    done = run(file, "--out", tmp_path / "sweeps", "--format", "json")
    assert done.return_value == 1, done.exception
    first, second = json.loads(done.stdout)["points"]
    assert first["state"] == "failed"
    assert dead in first["reason"]
    assert second["state"] == "done"
    assert second["verdict"] in JUDGED


def test_a_pair_that_cannot_start_stops_a_sweep_that_is_to_stop(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    more = f'[[pair]]\nbase_url = "http://127.0.0.1:9/v1"\n[[pair]]\nbase_url = "{server.url}"\n'
    file = write_sweep(tmp_path, None, loads="concurrency = [1]", more='on_failure = "stop"\n' + more)
    done = run(file, "--out", tmp_path / "sweeps", "--format", "json")
    assert done.return_value == 1, done.exception
    assert [point["state"] for point in json.loads(done.stdout)["points"]] == ["failed", "pending"]
    assert server.truth() == []


@pytest.mark.parametrize(
    ("loads", "more", "words"),
    [
        ("concurrency = [1]", "spread = true", "closed loop"),
        ("request_rate = [1]", 'grow = "3x"', "growth"),
        ("request_rate = [1]", 'arrivals = "gamma"', "burstiness"),
        ("request_rate = [1]", "repeat = true", "needs an end"),
        ("request_rate = [1]", 'output_tokens = "7"', "go together"),
        ("request_rate = [1, 99]", 'rescale = "thin"', "cannot make 99 req/s"),
    ],
)
@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_what_no_plan_can_be_is_refused_before_anything_begins(
    tmp_path: Path, loads: str, more: str, words: str, dry: tuple[str, ...]
) -> None:
    file = write_sweep(tmp_path, "http://127.0.0.1:9/v1", loads=loads, more=more)
    refused = run(file, "--out", tmp_path / "sweeps", *dry)
    assert isinstance(refused.exception, UsageError)
    assert words in str(refused.exception) and "tiny.toml" in str(refused.exception)
    assert not (tmp_path / "sweeps").exists()


def test_dollars_that_nobody_knows_are_not_zero(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, None, more='base_url = "http://127.0.0.1:9/v1"\n')
    looked = run(file, "--dry-run", "--format", "json")
    planned = json.loads(looked.stdout)
    assert planned["usd"] is planned["spent_usd"] is None
    assert planned["hours"] > 0 and planned["fits"]
    assert "- USD" in run(file, "--dry-run").stdout
    file.write_text("budget_usd = 1\n" + file.read_text())
    refused = run(file, "--dry-run")
    assert isinstance(refused.exception, UsageError)
    assert "needs a price" in str(refused.exception)


def test_a_trace_that_moved_can_be_named_anew(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    file = write_sweep(tmp_path, server.url, loads="concurrency = [1]", rows=3)
    go(file, "--out", tmp_path / "sweeps")
    folder = folder_of(tmp_path / "sweeps")
    (tmp_path / "trace.jsonl").rename(tmp_path / "moved.jsonl")
    gone = run("--resume", folder)
    assert isinstance(gone.exception, UsageError)
    assert f"harness sweep {file} --resume {folder}" in str(gone.exception)
    file.write_text(file.read_text().replace("trace.jsonl", "moved.jsonl"))
    go(file, "--resume", folder)
    go("--resume", folder)
    assert len(server.truth()) == 3


@pytest.mark.parametrize(("on_failure", "sent"), [("continue", 12), ("stop", 6)])
def test_an_invalid_point_is_recorded_with_its_reason(
    fake_server: StartServer, tmp_path: Path, on_failure: str, sent: int
) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    more = f'on_failure = "{on_failure}"\nextra_body = {{fault = "cut"}}\n'
    file = write_sweep(tmp_path, server.url, more=more)
    done = run(file, "--out", tmp_path / "sweeps", "--format", "json")
    assert done.return_value == (3 if on_failure == "continue" else 1), done.exception
    points = json.loads(done.stdout)["points"]
    assert len(server.truth()) == sent
    assert points[0]["verdict"] == "INVALID"
    assert "success" in points[0]["reason"]
    assert [p["state"] for p in points] == ["done", "done" if on_failure == "continue" else "pending"]


# --- the budget ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_paid_is_not_begun(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server()
    file = write_sweep(tmp_path, server.url, more="budget_usd = 0.00001\n")
    done = run(file, "--out", tmp_path / "sweeps", "--format", "json")
    assert done.return_value == 1, done.exception
    state = json.loads(done.stdout)
    assert {p["state"] for p in state["points"]} == {"skipped"}
    assert all(p["reason"].startswith("budget") for p in state["points"])
    assert state["rentals"] == []
    assert server.truth() == []


def test_what_is_too_dear_leaves_the_money_for_what_is_not(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    pairs = "".join(
        f'[[pair]]\ntier = "{tier}"\nbase_url = "{server.url}"\n' for tier in ("aws-p5.48xlarge", "aws-m7a.large")
    )
    file = write_sweep(tmp_path, None, loads="concurrency = [1]", more="budget_usd = 0.01\n" + pairs)
    done = run(file, "--out", tmp_path / "sweeps", "--format", "json")
    assert done.return_value == 1, done.exception
    dear, cheap = json.loads(done.stdout)["points"]
    assert (dear["state"], cheap["state"]) == ("skipped", "done")
    assert "of 0.01 USD" in dear["reason"]
    assert len(server.truth()) == 6


def test_a_point_that_spends_the_budget_is_cut_and_keeps_its_rows(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 answers in turn: 2 s by the estimate, 320 s in truth, and 5 s to spend."""
    monkeypatch.setattr(sweep_cost, "BETWEEN_S", 0.1)
    monkeypatch.setattr(warmup, "WARM_S", 1.0)
    server = fake_server("--ttft", "0.01", "--itl", "10.0")
    more = f"budget_hours = {5 / 3600}\n"
    file = write_sweep(
        tmp_path, server.url, rows=8, tokens=5, loads="concurrency = [1, 2]", more=more + 'order = "given"'
    )
    began = time.monotonic()
    done = run(file, "--out", tmp_path / "sweeps", "--format", "json")
    assert time.monotonic() - began < 200
    assert done.return_value == 1, done.exception
    folder = folder_of(tmp_path / "sweeps")
    cut, skipped = read_state(folder).points
    assert cut.state == "failed"
    assert "budget" in (cut.reason or "")
    assert skipped.state == "skipped"
    manifest = read_manifest(folder / cut.name)
    assert manifest.status == "stopped"
    assert sum(worker.rows or 0 for worker in manifest.workers) == 8, "every request has its row"


# --- servers that a sweep starts -------------------------------------------------------------------------------------


class Rented:
    """Stands for servers that are started: counts how often, and lets them die or not start at all."""

    def __init__(self, url: str, deaths: int = 0, refuse: BaseException | None = None) -> None:
        self.url, self.deaths, self.refuse = url, deaths, refuse
        self.opened: list[Path] = []
        self.up = 0

    def choose(self, options: dict[str, Any]) -> Any:
        target = UrlTarget([self.url], None, None)
        opened = target.open

        @contextmanager
        def open_(run: RunDir) -> Iterator[Servers]:
            self.opened.append(run.path)
            if self.refuse:
                raise self.refuse
            with opened(run) as servers:
                self.up += 1
                checks = iter([{0: "exit code 9"}] * self.deaths)
                self.deaths = 0
                servers.check = lambda: next(checks, {})
                yield servers
                self.up -= 1

        target.open = open_  # type: ignore[method-assign]
        return target


def test_points_share_servers_and_a_dead_server_is_replaced(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    rented = Rented(server.url)
    monkeypatch.setattr(sweep_run, "choose_target", rented.choose)
    file = write_sweep(tmp_path, server.url)
    go(file, "--out", tmp_path / "one")
    assert (len(rented.opened), rented.up) == (1, 0)

    rented = Rented(server.url, deaths=2)  # seen once when the point is over, once by the sweep
    monkeypatch.setattr(sweep_run, "choose_target", rented.choose)
    assert run(file, "--out", tmp_path / "two").return_value == 3
    assert (len(rented.opened), rented.up) == (2, 0)
    state = read_state(folder_of(tmp_path / "two"))
    assert [p.state for p in state.points] == ["done", "done"]
    assert state.points[0].verdict == "INVALID"
    assert "exit code 9" in (state.points[0].reason or "")
    assert len(state.rentals) == 2
    assert all(r.ended_s for r in state.rentals)


def test_a_server_that_dies_in_a_run_ends_that_point_alone(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    execute, ended = sweep_run.execute_point, list[RunManifest]()

    def dying(*args: Any, **more: Any) -> RunManifest:
        manifest = execute(*args, **more)
        if not ended:
            manifest.status, manifest.reason = "stopped", "replica 0 is gone: exit code 9"
        ended.append(manifest)
        return manifest

    monkeypatch.setattr(sweep_run, "execute_point", dying)
    assert run(write_sweep(tmp_path, server.url), "--out", tmp_path / "sweeps").return_value == 1
    first, second = read_state(folder_of(tmp_path / "sweeps")).points
    assert (first.state, second.state) == ("failed", "done"), "a budget that nobody set is not spent"
    assert first.reason == "replica 0 is gone: exit code 9"


def test_points_after_a_restart_wait_for_it_and_are_marked(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    rented = Rented(server.url)
    choose, checks = rented.choose, list[int]()

    def dying_after_its_first_point(options: dict[str, Any]) -> Any:
        target = choose(options)
        opened = target.open

        @contextmanager
        def open_(run: RunDir) -> Iterator[Servers]:
            with opened(run) as servers:
                servers.restarting = lambda: bool(servers.restarts) and servers.restarts[0].ready is None

                def check() -> dict[int, str]:
                    checks.append(len(server.truth()))
                    if not servers.restarts and checks[-1] == 6:
                        servers.restarts.append(Restart(replica=0, died="noon", how="killed by SIGKILL"))
                    elif checks.count(6) == 4:
                        servers.restarts[0] = replace(servers.restarts[0], ready="a minute past noon")
                    return {}

                servers.check = check
                yield servers

        target.open = open_
        return target

    monkeypatch.setattr(sweep_run, "choose_target", dying_after_its_first_point)
    go(write_sweep(tmp_path, server.url), "--out", tmp_path)
    folder = next(path.parent for path in tmp_path.glob("*/sweep.json"))
    first, second = read_state(folder).points
    assert checks.count(6) == 4, "the second point was not begun before"
    manifests = [read_manifest(folder / point.name) for point in (first, second)]
    assert [len(m.restarts) for m in manifests] == [1, 0]
    assert first.verdict == "INVALID"
    assert "server_restarts" in (first.reason or "")
    said = "replica 0 started again at a minute past noon, its cache empty"
    assert [[r.words for r in m.restarts_before] for m in manifests] == [[], [said]]
    assert f"on a server that died before it: {said}" in (second.reason or "")
    assert manifests[0].model_facts == manifests[1].model_facts, "the same weights, as `compare` asks"


def test_servers_that_do_not_start_fail_their_points_and_are_paid_for(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server()
    rented = Rented(server.url, refuse=ServerError("server 0 ended with exit code 1", ["out of memory"]))
    monkeypatch.setattr(sweep_run, "choose_target", rented.choose)
    done = run(write_sweep(tmp_path, server.url), "--out", tmp_path / "sweeps", "--format", "json")
    assert done.return_value == 1, done.exception
    state = json.loads(done.stdout)
    assert [p["state"] for p in state["points"]] == ["failed", "failed"]
    assert all("exit code 1" in p["reason"] for p in state["points"])
    assert len(rented.opened) == len(state["rentals"]) == 1
    assert state["rentals"][0]["ended_s"] is not None


def test_ctrl_c_while_servers_start_leaves_everything_to_do(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server()
    monkeypatch.setattr(sweep_run, "choose_target", Rented(server.url, refuse=KeyboardInterrupt()).choose)
    stopped = run(write_sweep(tmp_path, server.url), "--out", tmp_path / "sweeps")
    assert isinstance(stopped.exception, click.Abort)
    folder = folder_of(tmp_path / "sweeps")
    assert f"harness sweep --resume {folder}" in stopped.output.replace("\n", "")
    state = read_state(folder)
    assert [p.state for p in state.points] == ["pending", "pending"]
    assert [r.ended_s is not None for r in state.rentals] == [True]


def test_a_model_that_cannot_fit_is_refused_before_anything_is_rented(tmp_path: Path) -> None:
    more = 'models = ["smollm2-135m", "llama-2-13b-chat"]\ntiers = ["aws-m7a.large"]\n'
    refused = run(write_sweep(tmp_path, None, more=more), "--out", tmp_path / "sweeps")
    assert isinstance(refused.exception, HarnessError)
    assert "llama-2-13b" in str(refused.exception)
    assert "tiny.toml" in str(refused.exception)
    assert not (tmp_path / "sweeps").exists()


def test_a_plan_for_64_replicas_is_there_in_a_second(tmp_path: Path) -> None:
    """Generous bound: what counts is that nothing slow (Ray, weights, a server) is touched."""
    more = 'models = ["smollm2-135m"]\ntiers = ["aws-m7a.large"]\nreplicas = 64\nrepeats = 10\n'
    file = write_sweep(tmp_path, None, rows=1000, loads='concurrency = "1..4096x2"', more=more)
    began = time.process_time()
    looked = run(file, "--dry-run", "--format", "json")
    assert time.process_time() - began < 3
    planned = json.loads(looked.stdout)
    assert len(planned["runs"]) == 130
    (pair,) = planned["pairs"]
    assert pair["usd_per_hour"] == pytest.approx(64 * 0.11592)
    assert pair["usd"] == pytest.approx(pair["usd_per_hour"] * pair["hours"])
    assert pair["hours"] == pytest.approx(sum(r["hours"] for r in planned["runs"]) + pair["start_up_hours"])


# --- it ends in the middle -------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_ctrl_c_ends_the_point_in_order_and_the_sweep_can_go_on(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    file = write_sweep(tmp_path, server.url, rows=80, tokens=10, loads="concurrency = [2]")
    process = start(file, "--out", tmp_path / "sweeps")
    wait_for(lambda: len(server.truth()) > 5, 60, "5 answers")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    folder = folder_of(tmp_path / "sweeps")
    assert f"harness sweep --resume {folder}" in stderr
    state = read_state(folder)
    assert [p.state for p in state.points] == ["pending"]
    assert all(r.ended_s for r in state.rentals)
    manifest = read_manifest(folder / state.points[0].name)
    assert manifest.status == "stopped"
    assert sum(worker.rows or 0 for worker in manifest.workers) == 80

    go("--resume", folder)
    check_whole(folder, 1)
    assert (folder / f"{state.points[0].name}.aborted-1" / "run.json").exists()


def test_kill_9_at_any_moment_leaves_a_folder_that_can_go_on(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.002", "--itl", "0.001")
    file = write_sweep(tmp_path, server.url, loads="concurrency = [1, 2, 3]")
    out = tmp_path / "sweeps"

    def begin() -> subprocess.Popen[str]:
        return start(*(["--resume", folder_of(out)] if list(out.glob("[!.]*")) else [file, "--out", out]))

    moments = random.Random(os.getpid())
    whole: dict[str, tuple[int, int]] = {}
    left: list[psutil.Process] = []
    for _ in range(4):
        process = begin()
        try:
            process.wait(moments.uniform(0.2, 3.0))
        except subprocess.TimeoutExpired:
            left += descendants(process.pid)
        process.kill()
        process.communicate(timeout=120)
        for point in read_state(folder_of(out)).points if list(out.glob("[!.]*")) else ():
            rows = (folder_of(out) / point.name / "results-0.arrows").stat() if point.state == "done" else None
            if rows is not None:
                facts = (rows.st_ino, rows.st_mtime_ns)
                assert whole.setdefault(point.name, facts) == facts, "what was whole is never touched again"
    wait_for(lambda: all(gone(p) for p in left), 120, "workers ended")
    last = begin()
    _, stderr = last.communicate(timeout=120)
    assert last.returncode in DONE, stderr
    folder = folder_of(out)
    state = check_whole(folder, 3)
    assert all(r.ended_s is not None for r in state.rentals)
    for name, facts in whole.items():
        rows = (folder / name / "results-0.arrows").stat()
        assert (rows.st_ino, rows.st_mtime_ns) == facts


@pytest.mark.alone
def test_two_servers_in_turns_and_their_comparison(fake_server: StartServer, tmp_path: Path) -> None:
    """One command makes the pairs, A B B A A B, and names the next; a slower server is found."""
    servers = [fake_server("--itl", "0.002"), fake_server("--itl", "0.006")]
    more = 'order = "abba"\nrepeats = 3\nslo = { ttft = "5s" }\n' + "".join(
        f'[[pair]]\nbase_url = "{s.url}"\nlabel = "{name}"\n' for s, name in zip(servers, "ab", strict=True)
    )
    file = write_sweep(tmp_path, None, rows=40, tokens=8, loads="concurrency = [4]", more=more)
    done = go(file, "--out", tmp_path / "out")
    folder = folder_of(tmp_path / "out")
    state = check_whole(folder, 6)
    assert [state.pairs[p.pair].label for p in state.points] == ["a", "b", "b", "a", "a", "b"]
    assert [read_manifest(folder / p.name).label for p in state.points] == ["a", "b", "b", "a", "a", "b"]
    assert f"A against B: harness compare {folder}" in done.stdout
    a, b = sides_of_sweep(str(folder))
    assert [read_manifest(path).label for path in (*a, *b)] == ["a"] * 3 + ["b"] * 3
    with pytest.raises(UsageError, match="needs two sides"):
        sides_of_sweep(str(a[0]))
    if any(p.verdict != "VALID" for p in state.points):
        pytest.skip("on a busy machine some runs prove nothing, and are not compared")
    made = CliRunner().invoke(compare, [str(folder), "--fail-if", "tpot_p50 > +2ms"], standalone_mode=False)
    assert made.return_value == 4, made.output
