"""Rounding a model's weights to int8 or int4, in the formats of compressed-tensors that vLLM serves.

int8: "int-quantized", W8A8, activations rounded per token while serving. int4: "pack-quantized", W4A16. Nothing is
calibrated. Source: https://github.com/vllm-project/compressed-tensors. Imports torch, so it runs in a process of its
own (``python -m harness.cluster.catalogue.rounding FOLDER int8|int4 GROUP``, group 0 for none).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.cluster.catalogue.number_formats import QUANTIZATIONS

if TYPE_CHECKING:
    import torch

Format = Literal["int8", "int4"]
GROUP = 64
"""Weights of a row that share a scale in int4, by default."""
MULTIPLE = 32
"""Sides of a layer that vLLM's CPU kernel of 4-bit weights takes."""


def round_weights(folder: Path, to: Format, group: int | None = None) -> None:
    """Round every projection of the bf16 model in ``folder``, in place; embeddings, head and the rest stay.

    Symmetric. int8: one scale per output channel, largest magnitude / 127. int4: one for each ``group`` weights of a
    row, largest magnitude / 7. Raises ValueError for layers that do not fit.
    """
    from safetensors.torch import load_file, save_file

    plain: set[str] = set()
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        rounded: dict[str, torch.Tensor] = {}
        for name, weight in load_file(file).items():
            layer = name.removesuffix(".weight")
            if name.endswith("_proj.weight") and weight.ndim == 2:
                parts = _int8(weight) if to == "int8" else _int4(layer, weight, group or GROUP)
                rounded |= {f"{layer}.{part}": value for part, value in parts.items()}
                continue
            rounded[name] = weight
            if weight.ndim == 2 and "embed" not in layer:
                plain.add(layer)
        where |= dict.fromkeys(rounded, file.name)
        save_file(rounded, file, metadata={"format": "pt"})
    if not any(name.endswith("weight_scale") for name in where):
        raise ValueError("no layer is called ..._proj: this architecture is not known here")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        told = json.loads(index.read_bytes())
        index.write_text(json.dumps({**told, "weight_map": where}, indent=2), encoding="utf-8")
    file = folder / "config.json"
    ignore = sorted(plain | {"lm_head"})
    said: dict[str, Any] = {**copy.deepcopy(QUANTIZATIONS[to].config), "ignore": ignore}
    if to == "int4":
        said["config_groups"]["group_0"]["weights"]["group_size"] = group or GROUP
    settings = {**json.loads(file.read_bytes()), "quantization_config": said}
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _int8(weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
    import torch

    rows = weight.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
    return {
        "weight": torch.round(rows / scale).clamp(-127, 127).to(torch.int8), "weight_scale": scale.to(weight.dtype),
    }  # fmt: skip


def _int4(layer: str, weight: torch.Tensor, group: int) -> Mapping[str, torch.Tensor]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = weight.shape
    if columns % group or rows % MULTIPLE or columns % MULTIPLE:
        raise ValueError(
            f"{layer} is {rows} x {columns}: its width is not a multiple of the group ({group}), or a side is not one "
            f"of {MULTIPLE}; try another --group"
        )
    blocks = weight.float().view(rows, columns // group, group)
    scale = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / 7
    nearest = torch.round(blocks / scale).clamp(-8, 7).to(torch.int8).view(rows, columns)
    return {
        "weight_packed": pack_to_int32(nearest, 4), "weight_scale": scale.squeeze(-1).to(weight.dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }  # fmt: skip


if __name__ == "__main__":
    round_weights(Path(sys.argv[1]), "int8" if sys.argv[2] == "int8" else "int4", int(sys.argv[3]) or None)
