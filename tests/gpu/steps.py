"""The steps, in the order in which they are worth their time: what each runs, and how long it may take."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import harness

ROOT = Path(__file__).resolve().parents[2]
TRACE = Path(harness.__file__).resolve().parent / "scenarios" / "traces" / "azure-conv-2023.csv"
LIMIT_S = 8 * 60.0
"""No step takes longer, its end and its archive among it."""
LONGEST_TOKENS = 4000
"""Requests of the points, input and output: what Llama 2 takes too, so that all models get the same load."""
Rehearsal = Literal["simulated", "cpu"]
POINTS = ((1, 60), (8, 320), (32, 480), (128, 1600))
"""Requests in flight, and how many are sent."""
REHEARSED_POINTS = {"simulated": ((1, 60), (8, 120), (32, 320)), "cpu": ((1, 6), (4, 12))}
PEER_AT = {None: 32, "simulated": 32, "cpu": 4}
"""Requests in flight of the point that vLLM's own client is given, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What all steps share."""

    tier: str
    work: Path
    rehearse: Rehearsal | None = None

    @property
    def engine(self) -> list[str]:
        """Options of what serves."""
        virtual = ["--engine", "simulated", "--clock", "virtual"] if self.rehearse == "simulated" else []
        return ["--tier", "aws-m7a.large" if self.rehearse == "cpu" else self.tier, *virtual]

    def model(self, name: str) -> str:
        """The model of a step; on a CPU a small one stands in."""
        if self.rehearse != "cpu":
            return name
        return "smollm2-135m-int8" if "fp8" in name else "smollm2-135m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One archive."""

    name: str
    minutes: float
    """What it is expected to take; a budget counts with it."""
    says: str
    models: Sequence[str] = ()
    share: float = 1.0
    """Of the requests of its points, those that are sent: a slower model gets fewer."""
    kind: Literal["main job", "points", "capacity", "others"] = "points"

    def commands(self, ask: Ask, folder: Path) -> list[list[str]]:
        """What it runs, one after the other; each writes below ``folder``."""
        python = [sys.executable, "-m"]
        runs = ["--out", str(folder / "runs")]
        if self.kind == "main job":
            trace = [str(TRACE), "--limit", "60", "--concurrency", "8"]
            model = ["--model", ask.model("smollm2-135m"), "--min-requests", "50"]
            looks = [] if ask.rehearse else [["nvidia-smi", "-q"]]
            return [
                *looks,
                [*python, "harness", "doctor", "--format", "json"],
                [*python, "harness", "replay", *trace, *model, *ask.engine, *runs],
            ]
        if self.kind == "capacity":
            probes = ["--max-hours", "0.1", "--probe", "20s", "--tolerance", "0.2"]
            slo = "ttft_p95=1s,tpot_p95=50ms" if ask.rehearse != "cpu" else "ttft_p95=20s,tpot_p95=2s"
            model = ["--model", ask.model(self.models[0]), "--min-requests", "20"]
            again = ["--resume"] if any(folder.glob("runs/*/sweep.json")) else []
            words = ["--slo", slo, *model, *ask.engine, *probes, *runs, *again]
            return [[*python, "harness", "capacity", str(TRACE), *words]]
        trace = write_trace(ask.work / "trace.csv")
        if self.kind == "others":
            requests = "12" if ask.rehearse == "cpu" else "320"
            load = [str(trace), "--limit", requests, "--concurrency", "32", "--seed", "1", "--min-requests", "10"]
            return [
                [*python, "harness", "replay", *load, "--model", ask.model(name), *ask.engine, "--out", str(runs_of)]
                for name in self.models
                if not any(map(is_complete, (runs_of := folder / "runs" / name.replace(":", "-")).glob("*")))
            ]
        words = ["--rehearse", ask.rehearse] if ask.rehearse else []
        model = ask.model(self.models[0])
        words += ["--share", str(self.share)]
        return [[*python, "tests.gpu.points", str(trace), "--model", model, "--tier", ask.engine[1], *words, *runs]]


MISTRAL, LLAMA = "mistral-7b-instruct-v0.3", "llama-2-13b-chat"
STEPS = (
    Step(name="1-main-job", kind="main job", minutes=3, says="doctor, and the main job on real SmolLM2 weights"),
    Step(name="2-mistral-bf16", minutes=6, models=[f"{MISTRAL}:dummy"], says="Mistral 7B bf16: points"),
    Step(name="3-mistral-fp8", minutes=6, models=[f"{MISTRAL}-fp8:dummy"], says="Mistral 7B fp8: points"),
    Step(name="4-llama2-13b-bf16", minutes=7, models=[f"{LLAMA}:dummy"], share=0.5, says="Llama 2 13B bf16: points"),
    Step(name="5-llama2-13b-fp8", minutes=7, models=[f"{LLAMA}-fp8:dummy"], share=0.5, says="Llama 2 13B fp8: points"),
    Step(
        name="6-capacity", kind="capacity", minutes=8, models=[f"{MISTRAL}:dummy"],
        says="Mistral 7B bf16: capacity at ttft_p95=1s,tpot_p95=50ms on the Azure conversation trace",
    ),
    Step(
        name="7-others", kind="others", minutes=8, says="the others, one point each, as far as the time goes",
        models=["llama-3.1-8b-instruct:dummy", "llama-3.1-8b-instruct-fp8:dummy", "qwen3-8b:dummy"],
    ),
)  # fmt: skip


def is_complete(run: Path) -> bool:
    """Whether a run directory holds a run that came to its end."""
    try:
        return bool(json.loads((run / "run.json").read_text())["status"] == "complete")
    except (OSError, ValueError, KeyError):
        return False


def write_trace(path: Path) -> Path:
    """The Azure conversation trace without its longest requests."""
    if not path.exists():
        with TRACE.open(newline="") as source, path.open("w", newline="") as out:
            rows = csv.DictReader(source)
            assert rows.fieldnames
            kept = csv.DictWriter(out, rows.fieldnames)
            kept.writeheader()
            for row in rows:
                if int(row["ContextTokens"]) + int(row["GeneratedTokens"]) <= LONGEST_TOKENS:
                    kept.writerow(row)
    return path
