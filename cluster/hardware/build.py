"""Make the tables anew: ``python -m harness.cluster.hardware.build`` (ten minutes, 1 GB of scratch disk, PyPI).

aiconfigurator-core is installed into an environment that is thrown away; users never have it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.cluster.catalogue.models import (
    architecture,
    architectures,
    list_models,
    tensor_parallel_sizes,
    weight_bytes,
)
from harness.cluster.catalogue.tiers import list_tiers
from harness.cluster.hardware.bound import BoundStep, bound_step
from harness.cluster.hardware.chips import chip_of, chips
from harness.cluster.hardware.kernels import FOLDER, GRID, NEW, Floats, KernelStep, Tables, floor, key_of
from harness.cluster.simulator.step_time import Chunk

PACKAGE, VERSION = "aiconfigurator-core", "0.12.0"
SHA256 = "aadc4aad0a00bf8a61c477c62bef43de479849c3aa0b1c3078068e08309eccc4"
"""Of its wheel for Linux x86-64."""
MODES = {
    None: {"gemm_quant_mode": "bfloat16", "moe_quant_mode": "bfloat16", "kvcache_quant_mode": "bfloat16"},
    "fp8": {"gemm_quant_mode": "fp8", "moe_quant_mode": "fp8", "kvcache_quant_mode": "bfloat16"},
    "fp8-block": {"gemm_quant_mode": "fp8_block", "moe_quant_mode": "fp8_block", "kvcache_quant_mode": "bfloat16"},
}  # fmt: skip
"""By the catalogue's name. INT8 and INT4 have no measured kernels on any chip, and so no tables."""
LLAMA_ALIKE = ("MistralForCausalLM",)
"""Architectures that the package does not know and that differ from Llama in nothing that takes time."""
LEFT_OUT = ("gemma3", "gpt_oss", "kimi_k2", "smollm2")
"""Layers with a window are not simulated; the package knows no Gemma 3 and no Kimi K2 in these formats."""
SLOWEST = 1.1
"""A quantised step that takes more times the 16-bit one is a fault of the data, and refused."""

Job = dict[str, Any]
Results = dict[str, dict[str, Any]]


def collect(python: Path, jobs: Iterable[Job]) -> Iterator[dict[str, Any]]:
    """Answers of the package in the environment of ``python``, in the order of the jobs."""
    script = Path(__file__).with_name("collect.py")
    with tempfile.TemporaryFile("w+") as questions:
        questions.writelines(json.dumps(job) + "\n" for job in jobs)
        questions.seek(0)
        with subprocess.Popen(
            [python, script], stdin=questions, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:  # fmt: skip
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
    if process.returncode:
        raise SystemExit(f"{script.name} failed in {python}")


def install(folder: Path) -> Path:
    """A Python with the pinned package in a fresh environment."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(folder), f"{PACKAGE}=={VERSION}"], check=True)
    (wheel,) = folder.glob("*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
        raise SystemExit(f"{wheel.name}: its SHA-256 is {found}, not {SHA256}")
    subprocess.run([*pip, "install", str(wheel)], check=True)
    return python


def configurations(folder: Path) -> Iterator[Job]:
    """A job for every architecture, number format, chip and split that fits; config.json files go to ``folder``."""
    sizes = {model.architecture: model.parameters for model in list_models() if model.architecture}
    formats = {(model.architecture, model.quantization) for model in list_models()}
    rented = {chip_of(tier).name: chip_of(tier) for tier in list_tiers() if tier.accelerator}
    for name, config in architectures().items():
        if any(config["model_type"].startswith(kind) or name.startswith(kind) for kind in LEFT_OUT) or not (
            parameters := sizes.get(name)
        ):
            continue
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        known = ["LlamaForCausalLM"] if config["architectures"][0] in LLAMA_ALIKE else config["architectures"]
        (place / "config.json").write_text(json.dumps({**config, "architectures": known}))
        for chip in rented.values():
            for quantization, modes in MODES.items():
                if quantization == "fp8-block" and (name, quantization) not in formats:
                    continue
                if chip.kernels is None or (quantization and chip.fp8_tflops is None):
                    continue
                for parts in tensor_parallel_sizes(config, quantization, 8):
                    each_gb = weight_bytes(config, parameters, 2, quantization) / parts / 1e9
                    if parts in (1, 2, 4, 8) and each_gb < MOST_GB[chip.name] * 0.9:
                        yield {
                            "key": f"{chip.kernels}/{key_of(name, quantization, parts)}", "system": chip.kernels,
                            "model": str(place), "tp": parts, "moe_tp": parts, "moe_ep": 1, "modes": modes,
                            "grid": GRID,
                        }  # fmt: skip


MOST_GB = {"A100": 80, "L40S": 48, "RTX-PRO-6000": 96, "H100": 80, "H200": 141, "B200": 180}


def smoothed(tables: Tables) -> tuple[Tables, float]:
    """The same, nowhere falling with more work, and by how much the worst point was lowered.

    A point above one of more work is set to that: what disturbs a measurement adds time to it.
    """
    kept = tables.to_array()
    fixed = np.array(kept)
    n = len(GRID["tokens"])
    for k in range(5):
        fixed[k * n : (k + 1) * n] = _least_after(kept[k * n : (k + 1) * n], 0)
    edge = 5 * n
    for rows, columns in ((len(NEW), len(GRID["done"])), (len(GRID["sequences"]), len(GRID["length"]))):
        part = fixed[edge : edge + rows * columns].reshape(rows, columns)
        fixed[edge : edge + rows * columns] = _least_after(_least_after(part, 0), 1).ravel()
        edge += rows * columns
    return Tables.of_array(fixed, tables.layers), float(np.max(1 - fixed[kept > 0] / kept[kept > 0]))


def floored(tables: Tables, least: BoundStep) -> tuple[Tables, float]:
    """The same, nowhere below the roofline, and by how much the worst point was raised.

    The package scales measurements of short prompts down for a few new tokens after a long prefix, whose keys and
    values have to be read all the same.
    """
    kept = tables.to_array()
    fixed = np.maximum(kept, floor(least) * (1 + 1e-6))  # stored in 32 bits
    return Tables.of_array(fixed, tables.layers), float(np.max(fixed[kept > 0] / kept[kept > 0])) - 1


def _least_after(values: Floats, axis: int) -> Floats:
    return np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)


def slower(tables: Tables, plain: Tables) -> float:
    """The most that a step of the one takes as a multiple of the other's, over decoding and reading alike."""
    one, other = (KernelStep(t, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]) for t in (tables, plain))
    decodes = [one((), n, n * 1024) / other((), n, n * 1024) for n in (1, 8, 32, 128, 256)]
    reads = [one([Chunk(n, 0)], 0, 0) / other([Chunk(n, 0)], 0, 0) for n in (1024, 2048, 4096, 8192)]
    return max(decodes + reads)


def pack(answers: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Check answers of `collect`, and write a file for each system and the index of all."""
    found: Results = {}
    for answer in answers:
        system, key = answer["key"].split("/", 1)
        if "problem" in answer:
            found.setdefault(system, {})[key] = {
                "row": None,
                "refused": f"not in the package: {answer['problem'][:120]}",
            }
            continue
        name, form, parts = key.split(" ")
        tables, lowered = smoothed(Tables(layers=answer["layers"], **answer["tables"]))
        chip = next(chip for chip in chips().values() if chip.kernels == system)
        quantization = None if form == "bf16" else form
        least = bound_step(
            architecture(name), chip, quantization=quantization, tensor_parallel=int(parts.removeprefix("tp"))
        )  # fmt: skip
        tables, raised = floored(tables, least)
        origin = answer["origin"]
        found.setdefault(system, {})[key] = {
            "kept": tables, "layers": answer["layers"], "vllm": answer["vllm"],
            "silicon": round(origin.get("silicon", 0.0), 3), "mixed": round(origin.get("mixed", 0.0), 3),
            "lowered": round(lowered, 3), "raised": round(raised, 3),
        }  # fmt: skip
    folder.mkdir(exist_ok=True)
    index: dict[str, Any] = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "systems": {}}
    for system, rows in sorted(found.items()):
        values: list[np.ndarray[Any, Any]] = []
        for key, facts in rows.items():
            name, form, *rest = key.split(" ")
            plain = rows.get(" ".join([name, "bf16", *rest]), {}).get("kept")
            if form != "bf16" and plain is not None and "kept" in facts:
                times = slower(facts["kept"], plain)
                facts["times_bf16"] = round(times, 2)
                if times > SLOWEST:
                    facts["refused"] = f"its steps take up to {times:.2f} x those in 16 bits, which is not believed"
        for key, facts in rows.items():
            name, form, *_ = key.split(" ")
            if form != "bf16" and "kept" in facts and "times_bf16" not in facts:
                others = [other for k, other in rows.items() if k.startswith(f"{name} {form} ")]
                if any("refused" in other for other in others):
                    facts["refused"] = "there is nothing in 16 bits to hold it against, and other splits are refused"
        for facts in rows.values():
            tables = facts.pop("kept", None)
            facts["row"] = None if tables is None or "refused" in facts else len(values)
            if facts["row"] is not None:
                values.append(tables.to_array().astype(np.float32))
        index["systems"][system] = rows
        np.savez_compressed(folder / f"{system}.npz", values=np.array(values))
    text = ",\n".join(
        f'  "{system}": {{\n' + ",\n".join(f'    "{k}": {json.dumps(v)}' for k, v in rows.items()) + "\n  }"
        for system, rows in index.pop("systems").items()
    )
    head = json.dumps(index)[1:-1]
    (folder / "index.json").write_text(f'{{{head}, "systems": {{\n{text}\n}}}}\n', encoding="utf-8")


def main() -> None:
    """``[PYTHON]``: one that has the package already."""
    with tempfile.TemporaryDirectory() as scratch:
        python = Path(sys.argv[1]) if len(sys.argv) > 1 else install(Path(scratch) / "env")
        pack(collect(python, configurations(Path(scratch) / "models")), FOLDER)


if __name__ == "__main__":
    main()
