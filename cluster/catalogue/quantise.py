"""A model rounded to int8 or int4 in a folder that vLLM serves, and what it is made of: ``harness-quantised.json``.

Rounding to the nearest value needs nothing beyond what vLLM brings. It is the worst way there is to 8 or 4 bits: a
calibrated method looks at activations first (GPTQ by llm-compressor, which cannot share an environment with vLLM: they
pin different versions of compressed-tensors).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.cluster.catalogue.models import Model
from harness.cluster.catalogue.rounding import Format
from harness.cluster.catalogue.weights import CONVERT_S, run_step, sha256
from harness.errors import UsageError
from harness.record.manifest import now_utc, read_json, write_json

FILE = "harness-quantised.json"
SCHEMA_VERSION = "1"
Method = Literal["round-to-nearest", "gptq"]
CALIBRATION_TEXTS = "calibration.jsonl"
RECIPE = "calibrate.py"


@dataclass(slots=True, kw_only=True)
class Quantised:
    """What ``harness-quantised.json`` records."""

    schema_version: str = SCHEMA_VERSION
    created: str
    parent: str
    """Name or folder of the model it was made of."""
    parent_sha256: dict[str, str]
    """Of every file of weights there."""
    to: Format
    group: int | None
    """Weights that share a scale; None: a whole output channel."""
    method: Method
    seen: list[str] = field(default_factory=list)
    """`harness.audit.records.prompt_sha256` of each record that calibration, examples or tuning has seen: an audit does
    not grade them."""

    @property
    def words(self) -> str:
        """For people."""
        how = "calibrated by GPTQ" if self.method == "gptq" else f"not calibrated: the worst {self.to}"
        grouped = f" in groups of {self.group}" if self.group else ""
        return f"{self.to} of {Path(self.parent).name}{grouped}, {how}"


def read_quantised(folder: Path) -> Quantised | None:
    """What the model in ``folder`` was made of; None where no one has quantised it here. Raises `ResultsError`."""
    file = folder / FILE
    return read_json(file, Quantised, SCHEMA_VERSION, "model that was quantised here") if file.is_file() else None


def quantise(
    model: Model, weights: Path, out: Path, to: Format, group: int | None, seen: Sequence[str], *,
    texts: Sequence[str] | None, say: Callable[[str], None],
) -> Quantised:  # fmt: skip
    """Write the model in ``weights``, rounded, into the new folder ``out``.

    ``texts``: of calibration. Then nothing is rounded: the folder gets `CALIBRATION_TEXTS` and the `RECIPE` by which
    llm-compressor, in an environment of its own, puts the weights beside them.

    Raises `UsageError` for a model that is quantised already or whose layers cannot be, and `ServerError` where the
    rounding fails.
    """
    config = json.loads((weights / "config.json").read_bytes())
    if "quantization_config" in config or model.dummy:
        raise UsageError(f"{model.name}: has quantised or made-up weights; name the model that they were made of")
    if out.exists():
        raise UsageError(f"{out}: is there already; name another folder")
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{weights}: has no *.safetensors")
    made = Quantised(
        created=now_utc(), parent=model.name, parent_sha256={file.name: sha256(file) for file in files}, to=to,
        group=group, method="round-to-nearest" if texts is None else "gptq", seen=sorted(set(seen)),
    )  # fmt: skip
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        if texts is None:
            for file in weights.iterdir():
                if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".safetensors", ".txt"):
                    shutil.copyfile(file, partial / file.name)
            (partial / "harness-weights.json").unlink(missing_ok=True)
            say(f"rounding {model.name} to {to}")
            argv = [sys.executable, "-m", "harness.cluster.catalogue.rounding", str(partial), to, str(group or 0)]
            run_step(argv, partial, f"rounding of {model.name}", CONVERT_S)
        else:
            _write_recipe(partial, weights.resolve(), out.resolve(), to, group, texts)
        write_json(partial / FILE, made)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def steps(out: Path) -> list[str]:
    """Commands that put calibrated weights into the folder of a recipe."""
    python = shlex.quote(str(out / "venv/bin/python"))
    return [
        f"python3 -m venv {shlex.quote(str(out / 'venv'))}",
        f"{python} -m pip install llmcompressor",
        f"{python} {shlex.quote(str(out / RECIPE))}",
    ]


def _write_recipe(folder: Path, weights: Path, out: Path, to: Format, group: int | None, texts: Sequence[str]) -> None:
    with os.fdopen(os.open(folder / CALIBRATION_TEXTS, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    scheme = "W8A8" if to == "int8" else "W4A16"
    (folder / RECIPE).write_text(
        _RECIPE.format(weights=str(weights), out=str(out), scheme=scheme, group=group, texts=CALIBRATION_TEXTS),
        encoding="utf-8",
    )


_RECIPE = """# Calibrated {scheme} by GPTQ. Runs in an environment of its own: pip install llmcompressor.
import json
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

PARENT, OUT = {weights!r}, {out!r}
GROUP = {group}
texts = [json.loads(line)["text"] for line in open(OUT + "/{texts}", encoding="utf-8")]
model = AutoModelForCausalLM.from_pretrained(PARENT, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(PARENT)
data = Dataset.from_list([tokenizer(text, truncation=True, max_length=2048) for text in texts])
if "{scheme}" == "W4A16":
    weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    how = dict(config_groups={{"group_0": {{"targets": ["Linear"], "weights": weights}}}})
else:
    how = dict(scheme="W8A8", targets="Linear")
oneshot(model=model, dataset=data, recipe=GPTQModifier(ignore=["lm_head"], **how), num_calibration_samples=len(texts),
        max_seq_length=2048)
model.save_pretrained(OUT, save_compressed=True)
tokenizer.save_pretrained(OUT)
"""
