"""`harness simulate`: the run directory of a replay, made in virtual time, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from harness.cli import cli
from harness.cli.runner.targets import SimulatedTarget, Target, choose_target
from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.simulated import SimulatedServer, changed, simulated_engine
from harness.cluster.simulator.fleet import Workload, simulate
from harness.cluster.simulator.scheduler import VLLM, Limits
from harness.cluster.simulator.step_time import LinearStep
from harness.errors import UsageError
from harness.options import ReplayOptions, ServeOptions
from harness.record.manifest import read_manifest
from harness.record.results import read_results
from harness.record.samples import read_server_metrics
from harness.record.simulated import SimulatedRows, counters_at, write_rows

MODEL, TIER = "llama-3.1-8b-instruct", "aws-p5.4xlarge"
STEP = LinearStep(0.008, 0.00005, 0.00002)


def harness(*args: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    assert done.exception is None, (done.output, done.exception)
    return done.stdout


def trace(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simulated(folder: Path, rows: list[dict[str, object]], *more: str, step: str = "8,0.05,0.02") -> Path:
    """The run directory of these requests."""
    source = trace(folder / "trace.jsonl", rows)
    harness("simulate", source, "--model", MODEL, "--tier", TIER, "--step", step, "-o", folder / "runs", *more)
    (run,) = (folder / "runs").iterdir()
    return run


ROWS: list[dict[str, object]] = [
    {"arrival_s": k * 0.05, "input_tokens": 100 + 10 * (k % 7), "output_tokens": 20 + k % 13} for k in range(80)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(tmp_path_factory.mktemp("simulate"), ROWS, "--slo", "ttft=1s", "--replicas", "2")


def test_the_rows_are_what_the_engine_did(run: Path) -> None:
    engine = simulated_engine(get_model(MODEL), get_tier(TIER), STEP)
    load = Workload(
        arrival_s=np.array([row["arrival_s"] for row in ROWS], dtype=np.float64),
        input_tokens=np.array([row["input_tokens"] for row in ROWS]),
        output_tokens=np.array([row["output_tokens"] for row in ROWS]),
    )  # fmt: skip
    found = simulate(load, engine.limits, [STEP, STEP], router="least in flight")
    rows = read_results(run / "results-0.arrows").to_pylist()
    assert [row["request_id"] for row in rows] == list(range(80))
    for k, row in enumerate(rows):
        assert row["sent_ns"] == row["scheduled_ns"] == round(load.arrival_s[k] * 1e9)
        at = row["sent_ns"] + np.cumsum(row["chunk_gap_ns"])
        assert at == pytest.approx(found.token_s(k, row["output_tokens"]) * 1e9, abs=1)
        assert (row["replica"], row["finished_ns"], row["error"]) == (found.replica[k], at[-1], None)
        assert (row["output_tokens"], row["finish_reason"]) == (load.output_tokens[k], "length")
        assert row["chunk_tokens"] == [1] * row["output_tokens"]


def test_the_run_says_what_was_simulated(run: Path) -> None:
    manifest = read_manifest(run)
    assert (manifest.evidence, manifest.engine, manifest.engine_version) == ("simulated", "simulated", VLLM)
    assert manifest.model_facts["step_source"] == "given"
    assert "--max-num-batched-tokens=8192" in manifest.engine_args and len(manifest.replicas) == 2


def test_server_metrics_are_the_sums_of_the_rows(run: Path) -> None:
    rows = read_results(run / "results-0.arrows").to_pylist()
    for k in range(2):
        mine = [row for row in rows if row["replica"] == k]
        table = read_server_metrics(run / f"server-metrics-{k}.arrows")
        assert table is not None
        last = table.to_pylist()[-1]
        assert (last["running"], last["waiting"]) == (0, 0)
        assert last["generation_tokens_total"] == sum(row["output_tokens"] for row in mine)
        assert last["prompt_tokens_total"] == sum(row["input_tokens"] for row in mine)
        for sample in table.to_pylist():
            ended = [row for row in mine if row["finished_ns"] <= sample["t_ns"]]
            assert sample["generation_tokens_total"] >= sum(row["output_tokens"] for row in ended)
            come = sum(row["sent_ns"] < sample["t_ns"] < row["finished_ns"] for row in mine)
            assert sample["running"] + sample["waiting"] == come


def test_it_is_reported_priced_and_stamped(run: Path) -> None:
    report = json.loads(harness("report", run, "--format", "json"))
    assert (report["verdict"], report["evidence"]) == ("VALID", "simulated")
    assert report["cost"]["usd_per_1m_total"]["evidence"].startswith("simulated")
    assert "Simulated, not measured" in harness("report", run)
    assert "imulated" in harness("price", run)


def test_the_price_that_a_terminal_shows_last_says_what_it_is(run: Path, tmp_path: Path) -> None:
    assert re.search(r"\nsimulated, not measured: \d", harness("report", run)), "of steps that the user stated"
    source = trace(tmp_path / "trace.jsonl", ROWS)
    harness("simulate", source, "--model", MODEL, "--tier", "aws-g6.xlarge", "-o", tmp_path / "runs")
    (bound,) = (tmp_path / "runs").iterdir()
    assert "\nsimulated, not measured: at least " in harness("report", bound), "a roofline is a bound, no price"


def test_a_closed_loop_keeps_its_slots(tmp_path: Path) -> None:
    run = simulated(tmp_path, ROWS, "--concurrency", "4")
    rows = read_results(run / "results-0.arrows").to_pylist()
    for row in rows:
        at = row["sent_ns"]
        assert sum(one["sent_ns"] <= at < one["finished_ns"] for one in rows) <= 4
    assert sum(row["sent_ns"] == 0 for row in rows) == 4


def test_turns_wait_for_each_other(tmp_path: Path) -> None:
    turns = [
        {"arrival_s": 0.1 * k, "session_id": f"s{k % 3}", "input_tokens": 64 + 32 * k, "output_tokens": 40}
        for k in range(12)
    ]
    run = simulated(tmp_path, turns, "--sessions", "wait", "--min-requests", "1")
    rows = read_results(run / "results-0.arrows").to_pylist()
    for k in range(3, 12):
        assert rows[k]["sent_ns"] >= rows[k - 3]["finished_ns"]
        # a turn goes on with the prompt before it, whose whole blocks are in the cache
        assert rows[k]["cached_tokens"] == (64 + 32 * (k - 3)) // 16 * 16
    assert [row["cached_tokens"] for row in rows[:3]] == [0, 0, 0]


def test_a_session_stays_with_its_server(tmp_path: Path) -> None:
    turns = [
        {"arrival_s": 0.1 * k, "session_id": f"s{k % 3}", "input_tokens": 64 + 32 * k, "output_tokens": 40}
        for k in range(12)
    ]
    more = ["--sessions", "wait", "--replicas", "3", "--min-requests", "1", "--router"]
    for router in ("session", "prefix"):
        folder = tmp_path / router
        folder.mkdir()
        run = simulated(folder, turns, *more, router)
        rows = read_results(run / "results-0.arrows").to_pylist()
        assert [row["replica"] for row in rows[3:]] == [row["replica"] for row in rows[:9]]
        assert len({row["replica"] for row in rows}) == 3
        assert read_manifest(run).model_facts["router"] == router


def test_what_is_too_long_is_refused_as_a_server_does(tmp_path: Path) -> None:
    rows = [*ROWS[:5], {"arrival_s": 0.2, "input_tokens": 100_000, "output_tokens": 50}]
    run = simulated(tmp_path, rows, "--min-requests", "1")
    last = read_results(run / "results-0.arrows").to_pylist()[-1]
    assert (last["error"], last["chunk_gap_ns"], last["output_tokens"]) == ("rejected", [], None)
    assert "longer than the" in last["detail"]


def test_what_was_thrown_out_has_its_rows_and_counters(tmp_path: Path) -> None:
    n = 24
    load = Workload(
        arrival_s=np.zeros(n), input_tokens=np.full(n, 60), output_tokens=np.full(n, 100)
    )  # fmt: skip
    limits = Limits(max_num_seqs=24, max_num_batched_tokens=256, kv_blocks=100)
    found = simulate(load, limits, [STEP])
    assert len(found.resumed) > 3
    rows = SimulatedRows(
        request_id=np.arange(n), due_ns=np.zeros(n, dtype=np.int64), replica=found.replica,
        first_step=found.first_step, input_tokens=load.input_tokens, output_tokens=load.output_tokens,
        cached_tokens=None, step_end_ns=[np.rint(ends * 1e9).astype(np.int64) for ends in found.step_end_s],
        resumed=found.resumed,
    )  # fmt: skip
    write_rows(tmp_path / "rows", rows)
    for k, row in enumerate(read_results(tmp_path / "rows").to_pylist()):
        assert np.cumsum(row["chunk_gap_ns"]) == pytest.approx(found.token_s(k, 100) * 1e9, abs=1)
    steps = np.arange(len(found.step_end_s[0]) + 1)
    times = np.sort(np.concatenate([found.token_s(k, 100) for k in range(n)]))
    want = np.searchsorted(times, found.step_end_s[0], side="right")
    assert counters_at(rows, 0, steps)["generation_tokens_total"].tolist() == [0, *want]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--cancel", "5%@1s"], "clients that hang up are not simulated"),
        (["--tier", "aws-m7a.large", "--model", "smollm2-135m"], "no step times are known of a CPU"),
        (["--model", "gemma3-1b-it"], "window"),
        (["--model", "llama-3.1-70b-instruct"], "does not fit"),
    ],
)
def test_what_is_not_simulated_is_refused_in_words(tmp_path: Path, more: list[str], words: str) -> None:
    args = ["simulate", str(trace(tmp_path / "t.jsonl", ROWS)), "--model", MODEL, "--tier", TIER, "-o", str(tmp_path)]
    done = CliRunner().invoke(cli, [*args, *more], standalone_mode=False)
    assert isinstance(done.exception, UsageError) and words in str(done.exception)


def test_arguments_of_the_model_change_the_limits() -> None:
    limits = Limits(max_num_seqs=256, max_num_batched_tokens=2048, kv_blocks=100, prefix_cache=True)
    args = ["--max-num-seqs", "8", "--max-num-batched-tokens=512", "--num-gpu-blocks-override=51"]
    found = changed(limits, [*args, "--no-enable-prefix-caching", "--dtype", "bfloat16"])
    assert found == Limits(max_num_seqs=8, max_num_batched_tokens=512, kv_blocks=50)


def test_a_plan_without_prompts_is_not_sent(run: Path, tmp_path: Path) -> None:
    args = ["run", str(run / "plan.arrow"), "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "-o", str(tmp_path)]
    done = CliRunner().invoke(cli, args, standalone_mode=False)
    assert isinstance(done.exception, UsageError) and "simulated" in str(done.exception)


def target(**asked: object) -> Target:
    return choose_target(ReplayOptions(serve=ServeOptions(engine="simulated", **asked)))  # type: ignore[arg-type]


def test_servers_that_simulate_are_a_target_of_every_verb_that_sends() -> None:
    found = target(model=MODEL, tier=TIER)
    assert isinstance(found, SimulatedTarget) and len(found.vocabulary()) > 100_000
    with pytest.raises(UsageError, match="no tokens of texts"):
        found.check_prompts(chat=True, text=False)
    server = SimulatedServer(model=get_model(MODEL), tier=get_tier(TIER), step=(0.008, 0.00005, 0.00002))
    assert (server.name, server.evidence, server.facts()["step_source"]) == ("simulated", "simulated", "given")
    argv = server.command("127.0.0.1", 8000, "key").argv
    assert argv[argv.index("--simulate") :][:3] == ["--simulate", MODEL, TIER]
    assert argv[-2:] == ["--step", "8.0,0.05,0.02"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"model": MODEL}, "which hardware is simulated"),
        ({"model": MODEL, "tier": TIER, "base_urls": ("http://127.0.0.1:1/v1",)}, "drop --base-url"),
        ({"model": "smollm2-135m", "tier": "aws-m7a.large"}, "no step times are known of a CPU"),
    ],
)
def test_a_target_that_cannot_be_simulated_is_refused(asked: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        target(**asked)


def test_a_step_is_said_of_a_simulated_engine_alone() -> None:
    with pytest.raises(UsageError, match="--engine simulated"):
        choose_target(ReplayOptions(serve=ServeOptions(step=(0.01, 0.0, 0.0))))


def test_a_search_for_capacity_in_virtual_time_says_that_it_is_simulated(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows: list[dict[str, object]] = [
        {"arrival_s": at_s, "input_tokens": int(i), "output_tokens": int(o)}
        for at_s, i, o in zip(
            np.cumsum(rng.exponential(0.25, 600)).round(6), rng.integers(50, 2000, 600), rng.integers(5, 300, 600),
            strict=True,
        )
    ]  # fmt: skip
    said = harness(
        "capacity", trace(tmp_path / "t.jsonl", rows), "--engine", "simulated", "--clock", "virtual", "--model", MODEL,
        "--tier", TIER, "--step", "8,0.1,0.02", "--slo", "ttft_p95=1s,tpot_p95=50ms", "--tolerance", "25%",
        "--min-requests", "30", "-o", tmp_path / "found",
    )  # fmt: skip
    assert "Simulated, not measured" in said and f"{TIER}, simulated" in said
    closed = next(run for run in (tmp_path / "found").glob("*/*") if (run / "run.json").exists())
    manifest = read_manifest(closed)
    assert (manifest.evidence, manifest.spec.mode) == ("simulated", "closed")
    rows_of = read_results(closed / "results-0.arrows").to_pylist()
    assert manifest.spec.duration_s is not None
    sent = [row for row in rows_of if row["error"] is None]
    assert 0 < len(sent) < len(rows_of)
    assert max(row["sent_ns"] for row in sent) < manifest.spec.duration_s * 1e9
    assert {row["error"] for row in rows_of} == {None, "unsent"}
    assert all((row["sent_ns"], row["finished_ns"]) == (None, None) for row in rows_of if row["error"])


def test_replay_in_virtual_time_is_simulate(tmp_path: Path) -> None:
    source = trace(tmp_path / "t.jsonl", ROWS)
    args = ["--model", MODEL, "--tier", TIER, "--step", "8,0.05,0.02"]
    harness("simulate", source, *args, "-o", tmp_path / "a")
    harness("replay", source, *args, "--engine", "simulated", "--clock", "virtual", "-o", tmp_path / "b")
    one, other = (read_results(next(path.iterdir()) / "results-0.arrows") for path in (tmp_path / "a", tmp_path / "b"))
    assert one.equals(other)


def test_a_sweep_in_virtual_time_says_so_in_every_line_and_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'trace = "{trace(tmp_path / "t.jsonl", ROWS)}"\nmodels = ["{MODEL}", "{MODEL}-fp8"]\ntiers = ["{TIER}"]\n'
        'engine = "simulated"\nclock = "virtual"\nstep = "8,0.05,0.02"\n[loads]\nrequest_rate = [8, 16]\n'
    )
    said = harness("sweep", file, "-o", tmp_path / "out")
    lines = [line for line in said.splitlines() if line.startswith("00")]
    assert len(lines) == 4 and all("simulated, " in line for line in lines)
    assert "- USD" in said
