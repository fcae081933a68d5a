"""The measured rows of aiconfigurator-core's ``silicon_sample.csv``, cleaned, with their tables and the package's own
estimates: ``python -m tests.accuracy.collect [PYTHON]`` writes rows.csv, silicon.npz and index.json beside this file.

Left out, each counted: exact duplicates; attention data parallelism (labels that imply other numbers of GPUs); 512 and
more at once (rows contradict each other); NVIDIA's own client (neither budget nor replicas are said); what the package
cannot build.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.cluster.hardware.build import collect, install, smoothed
from harness.cluster.hardware.kernels import GRID, Tables

HERE = Path(__file__).parent
STEP_TOKENS = 8192
Row = Mapping[str, str]
SAME = ("system", "model_path", "precision", "isl", "osl", "tp_size", "silicon_ttft_ms", "silicon_tpot_ms")
FIELDS = (
    "id", "chip", "model", "precision", "tensor_parallel", "expert_parallel", "inputs", "outputs", "concurrency",
    "ttft_ms", "tpot_ms", "package_ttft_ms", "package_tpot_ms", "tables", "date",
)  # fmt: skip


def _number(text: str) -> int:
    """A whole number; missing, zero or below counts as 1."""
    return int(float(text)) if text and float(text) > 0 else 1


def job_of(row: Row) -> dict[str, Any] | None:
    """What the package is asked for a row: names that it has, the checkpoint's number format, the row's split."""
    parts, moe_tp, moe_ep = (_number(row[key]) for key in ("tp_size", "moe_tp_size", "moe_ep_size"))
    name, precision, system = row["model_path"], row["precision"], row["system"]
    modes: dict[str, str] = {}
    if "Llama" in name or name == "Qwen/Qwen3-32B":
        moe_tp, moe_ep = parts, 1
    elif not row["attention_dp_size"]:
        if moe_tp * moe_ep // parts > 1:
            return None
    elif moe_tp * moe_ep != parts:
        moe_tp = max(1, parts // moe_ep) if moe_ep > 1 else parts
    if name == "meta-llama/Llama-3.1-70B":
        name, form = "meta-llama/Meta-Llama-3.1-70B", "nvfp4" if precision == "fp4" else "fp8"
        modes = {"gemm_quant_mode": form, "kvcache_quant_mode": "fp8"}
    elif name == "MiniMaxAI/MiniMax-M2.5" and precision == "fp4":
        name = "nvidia/MiniMax-M2.5-NVFP4"
    elif name == "MiniMaxAI/MiniMax-M2.5" and precision == "fp8" and system in ("b200_sxm", "b300_sxm"):
        modes = {"gemm_quant_mode": "fp8", "moe_quant_mode": "fp8"}
    elif name == "moonshotai/Kimi-K2.5" and precision == "fp4":
        name = "nvidia/Kimi-K2.5-NVFP4"
    job = {"system": system, "model": name, "tp": parts, "moe_tp": moe_tp, "moe_ep": moe_ep, "modes": modes}
    return {"key": json.dumps(job, sort_keys=True), **job}


def kept(rows: list[Row], left_out: Counter[str]) -> Iterator[tuple[Row, dict[str, Any], int]]:
    """Rows to compare with, each with its job and its concurrency."""
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        if row["backend"] != "vllm" or row["mode"] != "agg":
            continue
        same = tuple(row[key] for key in SAME)
        said = re.search(r"silicon_concurrency=([0-9.]+)", row["silicon_data_source"])
        concurrency = int(float(said[1])) if said else _number(row["batch_size"])
        job = job_of(row)
        if same in seen:
            left_out["duplicates"] += 1
        elif "aic-auto-gap" in row["silicon_data_source"]:
            left_out["NVIDIA's own client"] += 1
        elif _number(row["attention_dp_size"]) > 1 or job is None:
            left_out["attention data parallelism"] += 1
        elif concurrency >= 512:
            left_out["512 and more at once"] += 1
        else:
            yield row, job, concurrency
        seen.add(same)


def main() -> None:
    """Write the three files."""
    with tempfile.TemporaryDirectory() as scratch:
        python = Path(sys.argv[1]) if len(sys.argv) > 1 else install(Path(scratch) / "env")
        code = "import aiconfigurator_core as a, pathlib; print(pathlib.Path(a.__file__).parent)"
        package = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
        source = package / "systems" / "silicon_sample.csv"
        left_out: Counter[str] = Counter()
        with source.open(newline="") as file:
            rows = list(kept(list(csv.DictReader(file)), left_out))
        jobs = {job["key"]: job for _, job, _ in rows}
        loads = {
            key: sorted({(n, int(r["isl"]), int(r["osl"])) for r, j, n in rows if j["key"] == key}) for key in jobs
        }
        ordered = sorted(jobs.values(), key=lambda job: job["system"])
        answers = collect(
            python,
            [{**job, "grid": GRID} for job in ordered]
            + [{**job, "loads": loads[job["key"]], "step_tokens": STEP_TOKENS} for job in ordered],
        )
        found, own = {}, {}
        for answer in answers:
            key = answer.pop("key")
            if "tables" in answer:
                found[key] = answer
            elif "estimates" in answer:
                own |= {(key, *load): one for load, one in zip(loads[key], answer["estimates"], strict=True) if one}
    values, index = [], {}
    with (HERE / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for row, job, concurrency in rows:
            answer = found.get(job["key"])
            load = (concurrency, int(row["isl"]), int(row["osl"]))
            if answer is None or (job["key"], *load) not in own:
                left_out["not in the package"] += 1
                continue
            if job["key"] not in index:
                tables, _ = smoothed(Tables(layers=answer["layers"], **answer.pop("tables")))
                index[job["key"]] = {"row": len(values), **answer}
                values.append(tables.to_array().astype(np.float32))
            ttft, tpot = own[(job["key"], *load)]
            when = re.search(r"measured=([\d-]+)", row["silicon_data_source"])
            writer.writerow([
                row["id"], row["system"], row["model_path"], row["precision"], job["tp"], job["moe_ep"], load[1],
                load[2], concurrency, f"{float(row['silicon_ttft_ms']):.6g}", f"{float(row['silicon_tpot_ms']):.6g}",
                f"{ttft:.6g}", f"{tpot:.6g}", index[job["key"]]["row"], when[1] if when else "",
            ])  # fmt: skip
    np.savez_compressed(HERE / "silicon.npz", values=np.array(values))
    text = json.dumps(
        {
            "source": f"aiconfigurator-core systems/{source.name}",
            "left_out": left_out,
            "tables": list(index.values()),
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        },
        indent=1,
    )  # fmt: skip
    (HERE / "index.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
