"""What `harness calibrate-model` leaves: the numbers of a step time, what runs they are from, and how well they fit.

On a chip that has tables of kernels the numbers are three at most: a factor for all kernels, one for the steps that
read prompts, and what the host does for each sequence. On one that has none (a CPU) they are those of a linear step,
and the time until the scheduler sees a request. A file says for which model on which hardware, and is refused for any
other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.hardware.kernels import KernelStep
from harness.cluster.simulator.step_time import LinearStep
from harness.errors import UsageError
from harness.record.manifest import Evidence, indented
from harness.untrusted import DECODE_ERRORS, read_regular

SCHEMA = "harness.model-calibration/1"
MOST_BYTES = 4 * 2**20
LEAST_OFF = 0.10
"""A cost from fitted steps is taken to be no better known than this: docs/ACCURACY.md, loads left out of a fit."""

Kind = Literal["kernels", "linear"]
"""Factors on the tables of a chip's kernels, or a step that is linear in what it works on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one load."""

    ttft_p50_s: float
    tpot_p50_s: float | None
    """None: no answer has two tokens."""
    output_tokens_per_s: float
    """From the first sending to the last end. Of a closed loop it is what cost follows from."""
    usd_per_1m_output: float | None
    """None: no tier, so no price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedLoad:
    """One load, measured and simulated."""

    load: str
    runs: list[str]
    requests: int
    measured: Figures
    uncalibrated: Figures | None
    """By what was known before; None: nothing was."""
    fitted: Figures
    held_out: Figures | None
    """By numbers fitted to the other loads alone; None: too few others."""

    @property
    def held_out_off(self) -> float | None:
        """Relative error of the cost of a load that was left out; None: it was not."""
        if self.held_out is None:
            return None
        return self.measured.output_tokens_per_s / self.held_out.output_tokens_per_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRun:
    """One of the runs."""

    name: str
    sha256: str
    """Of its result files, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCalibration:
    """The file."""

    schema: str = SCHEMA
    created: str
    model: str
    tier: str
    """Whose hardware it was; one of the same chip, or without any of the same name, is served by it as well."""
    chip: str
    tensor_parallel: int
    """0: on CPUs."""
    engine_version: str | None
    """Of the engine that was measured."""
    evidence: Evidence
    kind: Kind
    numbers: dict[str, float]
    errors: dict[str, float]
    """Relative standard errors of those that the runs tell."""
    not_told: dict[str, float | None]
    """The others, which are as without a calibration, and the relative standard errors for which they were given up;
    null: other numbers do the same as it."""
    condition: float
    """Condition number of the fit."""
    runs: list[SourceRun]
    loads: list[ComparedLoad]

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(indented(self)).hexdigest()

    @property
    def off(self) -> float:
        """What a cost may be off, relative: the most of any load left out, `LEAST_OFF` at least."""
        found = [abs(load.held_out_off) for load in self.loads if load.held_out_off is not None]
        return max(LEAST_OFF, *found) if found else 2 * LEAST_OFF

    @property
    def words(self) -> str:
        """Which it is, for the facts of a run."""
        names = ", ".join(f"{run.name} ({run.sha256[:12]})" for run in self.runs)
        return f"{self.sha256[:12]}, fitted to {names}"

    def fits(self, model: str, tier: str, engine: HardwareEngine) -> str | None:
        """Why it is not for a model on a tier; None: it is."""
        if model != self.model:
            return f"it is of model {self.model}, not {model}"
        mine = (self.chip, self.tensor_parallel)
        if mine != (engine.chip, engine.tensor_parallel) or (not self.tensor_parallel and tier != self.tier):
            parts = f"{self.tensor_parallel} x " if self.tensor_parallel else ""
            return f"it is of {parts}{self.chip} on tier {self.tier}, not tier {tier}"
        return None


def write_model_calibration(file: Path, found: ModelCalibration) -> None:
    """Write the file. Raises OSError."""
    file.write_bytes(indented(found))


def read_model_calibration(file: Path) -> ModelCalibration:
    """Read a file. Raises `UsageError` for anything else."""
    try:
        return decode_model_calibration(read_regular(file, MOST_BYTES))
    except (OSError, ValueError) as e:
        raise UsageError(f"{file}: not a calibration of a model ({e}); harness calibrate-model makes one") from e


def decode_model_calibration(text: bytes | str) -> ModelCalibration:
    """What a file holds. Raises ValueError for anything else."""
    try:
        found = msgspec.json.decode(text, type=ModelCalibration)
    except DECODE_ERRORS as e:
        raise ValueError(str(e)) from e
    if found.schema != SCHEMA:
        raise ValueError(f"schema {found.schema}, this harness reads {SCHEMA}")
    if any(not 0 <= value < 1e6 for value in found.numbers.values()):
        raise ValueError("its numbers are not possible")
    return found


def with_numbers(engine: HardwareEngine, kind: Kind, numbers: Mapping[str, float]) -> HardwareEngine:
    """The engine with these numbers. Raises ValueError where they are not those of its kind."""
    try:
        if kind == "linear":
            step = LinearStep(
                numbers["base_s"], numbers["per_sequence_s"], numbers["per_prompt_token_s"],
                numbers["per_context_token_s"],
            )  # fmt: skip
            return replace(engine, step_time=step, arrival_s=numbers["arrival_s"], arrival_per_token_s=0.0)
        known = engine.step_time
        if not isinstance(known, KernelStep):
            raise ValueError(f"no kernels are known of {engine.chip}, so there is nothing for factors")
        kernels = KernelStep(
            known.tables, known.graphs, replace(known.constants, mixed=numbers["mixed"]), kernels=numbers["kernels"],
            sequence_s=numbers["sequence_s"],
        )  # fmt: skip
        return replace(engine, step_time=kernels)
    except KeyError as e:
        raise ValueError(f"number {e} is missing") from e


def calibrated(engine: HardwareEngine, found: ModelCalibration) -> HardwareEngine:
    """The engine as its runs have it, stamped. Raises `UsageError` for numbers that are not for it."""
    try:
        fitted = with_numbers(engine, found.kind, found.numbers)
    except ValueError as e:
        raise UsageError(f"calibration {found.sha256[:12]}: {e}") from e
    low, high = 1 / (1 + found.off), 1 / (1 - min(found.off, 0.9))
    facts = {key: value for key, value in engine.facts.items() if key not in ("uncalibrated", "scaled")}
    facts |= {
        "step_source": "fitted", "calibration": found.words, "cost_range": f"{low:.2f} to {high:.2f}",
        "numbers": " ".join(f"{name}={value:.4g}" for name, value in found.numbers.items()),
    }  # fmt: skip
    if found.evidence != "measured":
        facts["calibrated_on"] = "simulated runs, which say nothing of hardware"
    return replace(fitted, source="fitted", facts=facts, cost_within=(low, high))
