"""`harness calibrate-model`: what it finds, where its file is used, and what it refuses."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from harness.cli import cli
from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.fake.engine import engine_of
from harness.cluster.engines.simulated import SimulatedServer, simulated_engine
from harness.cluster.hardware.calibrating import KERNELS, calibrate, linear_numbers
from harness.cluster.hardware.calibration import (
    ModelCalibration,
    calibrated,
    decode_model_calibration,
    read_model_calibration,
    with_numbers,
    write_model_calibration,
)
from harness.cluster.hardware.fit import Load, fit
from harness.errors import HarnessError, UsageError
from harness.record.manifest import RunDir, read_manifest, write_manifest
from tests.accuracy.recovery import TRUTH, engine, measured, misses

MODEL, TIER, GPU = "smollm2-135m", "aws-m7a.large", "aws-p5.4xlarge"
CALIBRATION = ModelCalibration(
    created="2026-12-01T00:00:00Z", model=MODEL, tier=TIER, chip="CPU", tensor_parallel=0, engine_version="0.32",
    evidence="measured", kind="linear", numbers=TRUTH, errors={}, not_told={}, condition=1.0, runs=[], loads=[],
)  # fmt: skip


def harness(*args: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    assert done.exception is None, (done.output, done.exception)
    return done.stdout


def refusal(*args: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    assert isinstance(done.exception, HarnessError), (done.output, done.exception)
    return str(done.exception)


@pytest.mark.parametrize("loads", [((1, 40), (4, 60)), ((1, 40), (16, 200))], ids=["1 and 4", "1 and 16"])
def test_numbers_that_are_known_are_found_within_their_standard_errors(loads: tuple[tuple[int, int], ...]) -> None:
    """A draw of what ``python -m tests.accuracy.recovery`` counts over dozens of seeds."""
    found = [misses(seed, loads) for seed in (100, 101)]
    off = np.abs([one[name] for one in found for name in TRUTH if name in one])
    assert len(off) >= 8 and np.mean(off < 2) >= 0.7 and off.max() < 4, off


def test_factors_of_kernels_are_found() -> None:
    bare = simulated_engine(get_model("llama-3.1-8b-instruct"), get_tier(GPU))
    truth = {"kernels": 1.3, "mixed": 1.1, "sequence_s": 6e-5}
    known = with_numbers(bare, "kernels", truth)
    loads = [measured(slots, n, 5, known) for slots, n in ((1, 30), (32, 320))]
    found = fit(loads, partial(with_numbers, bare, "kernels"), KERNELS)
    assert not found.not_told
    for name, value in truth.items():
        assert abs(np.log(found.values[name] / value)) < max(3 * found.errors[name], 0.02), (name, found)


def test_what_the_loads_do_not_tell_is_left_as_it_was_and_said() -> None:
    truth = engine({**TRUTH, "per_context_token_s": 0.0})
    loads = [measured(slots, n, 3, truth) for slots, n in ((1, 30), (4, 60))]
    found = fit(loads, engine, linear_numbers(loads))
    assert found.values["per_context_token_s"] == 0.0 and "per_context_token_s" in found.not_told
    assert found.values["base_s"] == pytest.approx(TRUTH["base_s"], rel=0.02)


def test_prompts_of_one_length_do_not_tell_what_a_token_takes_apart_from_what_a_request_does() -> None:
    def same(load: Load) -> Load:
        tokens = np.full(len(load), 200)
        return replace(load, input_tokens=tokens, ttft_s=np.full(len(load), 0.1), decode_s=np.full(len(load), 1.0))

    loads = [same(measured(1, 30, 3, engine(TRUTH)))]
    found = fit(loads, engine, linear_numbers(loads))
    assert found.not_told["arrival_s"] == np.inf and found.condition < 30
    assert found.values["arrival_s"] == 0.0 and "per_sequence_s" in found.not_told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one, four: [one], "all runs are of one load"),
        (lambda one, four: [four], "--concurrency 1"),
        (lambda one, four: [one, replace(four, concurrency=9)], "too few: run 90 or more"),
        (lambda one, four: [one, replace(four, decode_s=np.full(len(four), np.nan))], "no answer of two tokens"),
    ],
)
def test_loads_that_tell_too_little_are_refused_with_what_to_run(
    change: Callable[[Load, Load], list[Load]], words: str
) -> None:
    one, four = (measured(slots, n, 1, engine(TRUTH)) for slots, n in ((1, 20), (4, 40)))
    with pytest.raises(UsageError, match=words):
        calibrate(change(one, four), engine(TRUTH), 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 1, 4 and 8 in flight, by a known engine."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_model_calibration(folder / "truth.json", CALIBRATION)
    draw = np.random.default_rng(1)
    rows = [
        {"arrival_s": 0.5 * k, "input_tokens": int(i), "output_tokens": int(o)}
        for k, (i, o) in enumerate(zip(draw.integers(20, 900, 100), draw.integers(10, 90, 100), strict=True))
    ]
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for slots in (1, 4, 8):
        limit = 40 if slots == 1 else 90
        harness("simulate", folder / "trace.jsonl", "--model", MODEL, "--tier", TIER, "--calibration",
                folder / "truth.json", "--concurrency", str(slots), "--limit", str(limit), "-o",
                folder / "runs" / str(slots))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> ModelCalibration:
    harness("calibrate-model", *sorted((folder / "runs").iterdir()), "-o", folder / "found.json")
    return read_model_calibration(folder / "found.json")


def test_runs_become_a_file_with_errors_and_loads_foretold(folder: Path, found: ModelCalibration) -> None:
    for name, value in TRUTH.items():
        assert abs(np.log(found.numbers[name] / value)) < max(3 * found.errors[name], 0.01), name
    assert [load.load for load in found.loads] == ["1 in flight", "4 in flight", "8 in flight"]
    assert found.loads[0].held_out is None, "without it nothing can be fitted"
    for load in found.loads[1:]:
        assert load.held_out is not None and load.uncalibrated is None
        assert load.held_out.output_tokens_per_s == pytest.approx(load.measured.output_tokens_per_s, rel=0.03)
        assert load.held_out.tpot_p50_s == pytest.approx(load.measured.tpot_p50_s, rel=0.05)
    assert all(len(run.sha256) == 64 for run in found.runs) and len(found.runs) == 3
    said = harness("calibrate-model", *sorted((folder / "runs").iterdir()), "-o", folder / "again.json")
    assert "standard error" in said and "foretold by the others" in said


def test_the_file_is_used_and_stamped_wherever_something_is_simulated(folder: Path, found: ModelCalibration) -> None:
    file = folder / "found.json"
    args = ["--model", MODEL, "--tier", TIER, "--calibration", file, "--rate", "2", "--limit", "40"]
    harness("simulate", folder / "trace.jsonl", *args, "-o", folder / "a")
    harness("replay", folder / "trace.jsonl", "--engine", "simulated", "--clock", "virtual", *args, "-o", folder / "b")
    for place in ("a", "b"):
        (run,) = (folder / place).iterdir()
        facts = read_manifest(run).model_facts
        assert facts["step_source"] == "fitted" and facts["calibration"].startswith(found.sha256[:12])
        assert all(one.sha256[:12] in facts["calibration"] for one in found.runs)
        assert "simulated runs" in facts["calibrated_on"] and "cost_range" in facts
        assert "fitted to measured runs" in harness("report", run)
    argv = SimulatedServer(model=get_model(MODEL), tier=get_tier(TIER), calibration=found).command("h", 1, "k").argv
    assert decode_model_calibration(argv[argv.index("--calibration") + 1]) == found


def test_advice_takes_what_was_measured_and_shows_it_beside(folder: Path, found: ModelCalibration) -> None:
    args = ["--model", MODEL, "--calibration", folder / "found.json", "--slo", "ttft=3s,tpot=100ms", "--tier", TIER]
    said = harness("advise", folder / "trace.jsonl", *args)
    assert "fitted" in said and "measured (simulated), simulated, and the fit" in said and "8 in flight" in said
    told = json.loads(harness("advise", folder / "trace.jsonl", *args, "--format", "json"))
    (offer,) = told["offers"]
    assert offer["step_times"] == "fitted" and offer["low"] < offer["usd_per_1m_output"] < offer["high"]
    assert told["calibrations"] == [msgspec.to_builtins(found)]


def test_kernels_take_factors_and_are_no_longer_uncalibrated() -> None:
    model, tier = get_model("qwen3-32b"), get_tier("aws-g6e.12xlarge")
    bare = simulated_engine(model, tier)
    found = replace(
        CALIBRATION, model=model.name, tier=tier.name, chip=bare.chip, tensor_parallel=bare.tensor_parallel,
        kind="kernels", numbers={"kernels": 2.0, "mixed": 1.0, "sequence_s": 1e-3},
    )  # fmt: skip
    mine = simulated_engine(model, tier, calibration=found)
    assert mine.step_time((), 8, 800) > 1.9 * bare.step_time((), 8, 800)
    assert "uncalibrated" in bare.facts and "uncalibrated" not in mine.facts
    assert mine.source == "fitted" and mine.cost_within is not None and mine.facts["step_source"] == "fitted"
    with pytest.raises(UsageError, match="it is of"):
        simulated_engine(model, get_tier("aws-p5.48xlarge"), calibration=found)


def test_servers_in_real_time_take_it() -> None:
    text = msgspec.json.encode(CALIBRATION).decode()
    args = argparse.Namespace(step=None, simulate=[MODEL, TIER], calibration=text, slow=1.0)
    paced = engine_of(args, asyncio.new_event_loop())
    known = simulated_engine(get_model(MODEL), get_tier(TIER), calibration=CALIBRATION)
    assert paced.step_time((), 3, 900) == known.step_time((), 3, 900) == engine(TRUTH).step_time((), 3, 900)


def test_a_file_is_for_its_own_model_and_hardware(folder: Path, found: ModelCalibration) -> None:
    mine = ["simulate", folder / "trace.jsonl", "-o", folder / "no", "--calibration", folder / "found.json"]
    assert "it is of model smollm2-135m" in refusal(*mine, "--model", "smollm2-135m-int8", "--tier", TIER)
    assert "not tier aws-m7a.xlarge" in refusal(*mine, "--model", MODEL, "--tier", "aws-m7a.xlarge")
    assert "drop one" in refusal(*mine, "--model", MODEL, "--tier", TIER, "--step", "8,1,1")
    (folder / "not.json").write_text("{}")
    args = ["simulate", folder / "trace.jsonl", "--model", MODEL, "--tier", TIER, "--calibration", folder / "not.json"]
    assert "not a calibration of a model" in refusal(*args, "-o", folder / "no")
    with pytest.raises(UsageError, match="no kernels are known"):
        calibrated(engine(TRUTH), replace(CALIBRATION, kind="kernels"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "smollm2-135m-int8", "differ in model"),
        ("engine_version", "0.31", "differ in engine version"),
        ("tier", get_tier("aws-m7a.xlarge"), "differ in tier"),
        ("evidence", "measured", "differ in evidence"),
        ("status", "failed", "INVALID"),
    ],
)
def test_runs_of_two_systems_and_runs_that_are_not_sound_are_refused(
    folder: Path, tmp_path: Path, field: str, value: object, words: str
) -> None:
    (source,) = (folder / "runs" / "8").iterdir()
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    for file in source.iterdir():
        (other.path / file.name).write_bytes(file.read_bytes())
    manifest = read_manifest(source)
    setattr(manifest, field, value)
    write_manifest(other, manifest)
    assert words in refusal("calibrate-model", folder / "runs" / "1", other.path, "-o", tmp_path / "no.json")
