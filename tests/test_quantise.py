"""`harness quantise`: what it writes is within a rounding step, and an audit knows which records it has seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.audit.records import prompt_sha256, read_records, without_seen
from harness.cli import cli
from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.quantise import CALIBRATION_TEXTS, RECIPE, read_quantised
from harness.cluster.catalogue.rounding import round_weights
from harness.options import PlanOptions
from harness.trace.io import open_asked

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A tiny model of random weights, in two files with an index."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    first = {f"{LAYER}.weight": torch.randn(64, 128, generator=draw).to(torch.bfloat16)}
    second = {
        "model.embed_tokens.weight": torch.randn(32, 128, generator=draw).to(torch.bfloat16),
        "model.router.weight": torch.randn(4, 128, generator=draw).to(torch.bfloat16),
        "model.norm.weight": torch.ones(128, dtype=torch.bfloat16),
    }
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensors in zip(names, (first, second), strict=True):
        safetensors.save_file(tensors, folder / name)
    where = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text('{"max_position_embeddings": 64, "dtype": "bfloat16"}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


def quantised(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["quantise", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output + repr(done.exception)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.load_file(file)
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == found.keys()
    return found


def test_int4_comes_back_within_half_a_step(parent: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantised(parent, "--to", "int4", "--group", "32", "-o", tmp_path / "int4")
    exact, found = weights(parent), weights(tmp_path / "int4")
    packed, scale = found[f"{LAYER}.weight_packed"], found[f"{LAYER}.weight_scale"].float()
    assert packed.dtype == torch.int32 and packed.shape == (64, 128 // 8) and scale.shape == (64, 128 // 32)
    assert found[f"{LAYER}.weight_shape"].tolist() == [64, 128]
    # eight to an integer, the first in its lowest bits, 8 added to each
    values = torch.stack([(packed >> 4 * k) & 15 for k in range(8)], dim=-1).view(64, 128) - 8
    steps = scale.repeat_interleave(32, dim=1)
    error = (values * steps - exact[f"{LAYER}.weight"].float()).abs()
    assert bool((error <= steps * (0.5 + 7 * 2**-8)).all())
    assert all(torch.equal(found[name], exact[name]) for name in exact if not name.startswith(LAYER))
    said = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "pack-quantized"
    assert said["ignore"] == ["lm_head", "model.router"]
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 32
    made = read_quantised(tmp_path / "int4")
    assert made is not None and made.words == "int4 of tiny in groups of 32, not calibrated: the worst int4"
    model = get_model(str(tmp_path / "int4"))
    assert (model.quantization, model.chat) == ("int4", True)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "int4"}, "nothing half made is left"


def test_what_cannot_be_quantised_is_refused(parent: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    with pytest.raises(ValueError, match=r"q_proj is 64 x 128: its width is not a multiple of the group \(48\)"):
        round_weights(parent, "int4", 48)
    assert "one scale for each" in quantised(parent, "--to", "int8", "--group", "64", "-o", tmp_path / "a", code=1)
    quantised(parent, "--to", "int8", "-o", tmp_path / "int8")
    assert weights(tmp_path / "int8")[f"{LAYER}.weight"].dtype == torch.int8
    assert "there already" in quantised(parent, "--to", "int8", "-o", tmp_path / "int8", code=1)
    assert "has quantised" in quantised(tmp_path / "int8", "--to", "int4", "-o", tmp_path / "b", code=1)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_records_that_calibrated_are_not_graded(parent: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"arrival_s": i, "prompt": f"How much is {i}?", "session_id": f"s{i // 2}", "expected": str(i),
         "check": {"type": "contains"}}
        for i in range(40)
    ]  # fmt: skip
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = quantised(parent, "--to", "int8", "--calibrate", trace, "--share", "0.3", "-o", tmp_path / "gptq")
    assert "pip install llmcompressor" in said
    texts = (tmp_path / "gptq" / CALIBRATION_TEXTS).read_text().splitlines()
    assert len(texts) == 12 and (tmp_path / "gptq" / CALIBRATION_TEXTS).stat().st_mode & 0o777 == 0o600
    compile((tmp_path / "gptq" / RECIPE).read_text(), RECIPE, "exec")
    made = read_quantised(tmp_path / "gptq")
    assert made is not None and len(made.seen) == 12 and "calibrated by GPTQ" in made.words

    records = read_records(open_asked(trace, PlanOptions()), None, None)
    # one record of a session that was seen takes the other with it
    left = without_seen(records, made.seen[:1])
    assert sum(record.check is None for record in left) == 2
    lost = {record.session for record in left if record.check is None}
    assert [prompt_sha256(r.source) in made.seen[:1] for r in records if r.session in lost].count(True) == 1
    assert sum(record.check is not None for record in without_seen(records, made.seen)) == 28
