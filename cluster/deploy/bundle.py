"""A bundle: all that a host without a network lacks, in parts of a size that can be carried there.

Comes in: names of packages, models and files. Goes out: a folder with ``install.sh``, ``install.py``
(`cluster.deploy.install_bundle`), ``bundle.json`` (hashes of every part and file) and the parts of one tar archive:
``wheels/``, ``cache/models/`` and ``files/``.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.weights import ensure_weights, sha256
from harness.cluster.deploy import install_bundle
from harness.cluster.deploy.bundle_wheels import HostPython, Packages, download, own_wheel, read_wheel
from harness.errors import HarnessError, ServerError, UsageError
from harness.record.manifest import now_utc

COMPILED_SHARE = 0.3
"""Bytecode that pip writes beside Python files, as a share of what is unpacked; generous."""

INSTALL_SH = """\
#!/bin/sh
# Joins, checks and installs this bundle, without a network: sh install.sh FOLDER (or --check: the parts alone)
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
seen=
for python in ${PYTHON:-python3 python@PYTHON@}; do
  command -v "$python" >/dev/null 2>&1 || continue
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  if [ "$version" = "@PYTHON@" ]; then
    exec "$python" -B "$here/install.py" "$@"
  fi
  seen="$seen, $python is $version"
done
echo "install.sh: this bundle is for Python @PYTHON@, which was not found$seen:" \\
  "PYTHON=/path/to/python@PYTHON@ sh install.sh FOLDER, or make a bundle --python of what is here" >&2
exit 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSpec:
    """What is asked for."""

    host: HostPython
    packages: Packages = field(default_factory=Packages)
    models: Sequence[str] = ()
    files: Sequence[Path] = ()
    part_bytes: int = 48 << 20


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """``bundle.json``."""

    schema: str = "harness.bundle/1"
    created: str
    harness: str
    python: str
    machine: str
    glibc: tuple[int, int]
    extras: list[str]
    packages: dict[str, str]
    """Carried ones, by canonical name."""
    host_packages: list[dict[str, str]]
    """What the host must have: name and version."""
    left_out: list[str]
    models: dict[str, str]
    """What to say as --model on the host, by what was asked for."""
    disk_bytes: int
    """Room that an installation needs while it runs."""
    files: list[dict[str, str | int]]
    parts: list[dict[str, str | int]]


@dataclass(slots=True)
class _Contents:
    """Files of the archive by their path in it."""

    files: dict[str, Path] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    def add(self, source: Path, under: str) -> None:
        """A file, or all files of a folder."""
        if source.is_file():
            self.files[f"{under}/{source.name}"] = source
            return
        for path in sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                self.files[f"{under}/{source.name}/{path.relative_to(source).as_posix()}"] = path


def make_bundle(spec: BundleSpec, out: Path, say: Callable[[str], None]) -> Bundle:
    """Write the bundle into ``out``, a new or empty folder. Raises `UsageError`, and `HarnessError` for what cannot be
    downloaded or written.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} exists and is not empty: name another folder (-o), or remove it")
    spec.host.check()
    for path in spec.files:
        if not path.exists():
            raise UsageError(f"{path}: there is no such file or folder to carry")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as work:
            return _make(spec, out, Path(work), say)
    except OSError as e:
        raise HarnessError(f"{e.filename or out}: {e.strerror}; nothing of the bundle can be used") from e


def _make(spec: BundleSpec, out: Path, work: Path, say: Callable[[str], None]) -> Bundle:
    contents = _Contents()
    for path in spec.files:
        contents.add(path.resolve(), "files")
    for name in spec.models:
        _add_model(name, contents, say)
    say("building the harness's own wheel")
    own = own_wheel(spec.host, work)
    wheels, needed = download(spec.host, own, spec.packages, work, say)
    facts = [read_wheel(path) for path in wheels]
    for path in wheels:
        contents.add(path, "wheels")
    say(f"writing {len(contents.files)} files in parts of {spec.part_bytes / 2**20:.0f} MiB")
    files = sorted(contents.files.items())
    parts = write_parts(files, out, spec.part_bytes)
    bundle = Bundle(
        created=now_utc(), harness=read_wheel(own).version, python=".".join(map(str, spec.host.python)),
        machine=spec.host.machine, glibc=spec.host.glibc, extras=list(spec.packages.extras),
        packages={wheel.name: wheel.version for wheel in facts}, host_packages=needed,
        left_out=sorted(spec.packages.nowhere), models=contents.models,
        disk_bytes=sum(source.stat().st_size for _, source in files)
        + int(sum(wheel.unpacked_bytes for wheel in facts) * (1 + COMPILED_SHARE)),
        files=[{"path": path, "bytes": source.stat().st_size, "sha256": sha256(source)} for path, source in files],
        parts=parts,
    )  # fmt: skip
    (out / install_bundle.MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(bundle)) + b"\n")
    shutil.copyfile(install_bundle.__file__, out / "install.py")
    (out / "install.sh").write_text(INSTALL_SH.replace("@PYTHON@", bundle.python), encoding="utf-8")
    (out / "install.sh").chmod(0o755)
    return bundle


def _add_model(name: str, contents: _Contents, say: Callable[[str], None]) -> None:
    """Its weights; nothing of dummy ones, whose configuration the catalogue in the wheel has."""
    model = get_model(name)
    contents.models[name] = name
    if model.dummy:
        return
    try:
        folder = ensure_weights(model, say=say)
    except ServerError as e:
        contents.models[name] = f"{name}:dummy"
        get_model(f"{name}:dummy")  # raises where no architecture is known: then there is nothing to carry
        say(f"{name}: no weights to be had ({e}); on the host serve {name}:dummy: speed only, its answers mean nothing")
        return
    label = name if model.source == "pypi-gguf" else name.replace("/", "-").strip("-")
    for path in sorted(folder.rglob("*")):
        if path.is_file():  # the hub's cache holds links
            contents.files[f"cache/models/{label}/{path.relative_to(folder).as_posix()}"] = path.resolve()
    if model.source != "pypi-gguf":
        contents.models[name] = f"FOLDER/cache/models/{label}"


def write_parts(files: Sequence[tuple[str, Path]], out: Path, part_bytes: int) -> list[dict[str, str | int]]:
    """One tar archive of the files, cut into ``part-NNN`` of at most ``part_bytes``; their sizes and hashes.

    Nothing of this machine is in it (owners, times), so the same files make the same parts.
    """
    parts = _Parts(out, part_bytes)
    with tarfile.open(fileobj=parts, mode="w|", bufsize=1 << 20) as archive:  # type: ignore[call-overload]
        for name, path in files:
            member = tarfile.TarInfo(name)
            member.size = path.stat().st_size
            member.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            with path.open("rb") as source:
                archive.addfile(member, source)
    return parts.finish()


class _Parts:
    """A stream that begins another file whenever one is full."""

    def __init__(self, out: Path, part_bytes: int) -> None:
        self._out, self._limit = out, part_bytes
        self._file: IO[bytes] | None = None
        self._room = 0
        self._paths: list[Path] = []

    def write(self, block: bytes) -> int:
        view = memoryview(block)
        while view:
            if not self._room:
                self._next()
            assert self._file is not None
            piece = view[: self._room]
            self._file.write(piece)
            self._room -= len(piece)
            view = view[len(piece) :]
        return len(block)

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        self._paths.append(self._out / f"part-{len(self._paths) + 1:03d}")
        self._file = self._paths[-1].open("wb")
        self._room = self._limit

    def finish(self) -> list[dict[str, str | int]]:
        """Name, bytes and SHA-256 of every part."""
        if self._file is not None:
            self._file.close()
        return [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in self._paths]
