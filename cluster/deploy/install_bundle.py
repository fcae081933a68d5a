"""Installs a bundle (`cluster.deploy.bundle`) on a host without a network: install.py in the bundle, run by install.sh.

Standard library alone: nothing of the harness is installed yet. Everything is checked before anything is written: that
no part is missing or damaged, that the host has what was not carried, and that the disk has room.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST = "bundle.json"
UNFINISHED = ".installing"
BLOCK = 1 << 20
GB = 1e9


class InstallError(Exception):
    """What is wrong, where, and what to do."""


class Joined(io.RawIOBase):
    """Files one after the other, as one stream."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = iter(paths)
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes read; 0 at the end of the last file."""
        while True:
            if self._file is None:
                path = next(self._paths, None)
                if path is None:
                    return 0
                self._file = path.open("rb")
            if got := self._file.readinto(buffer):
                return int(got)
            self._file.close()
            self._file = None


def read_manifest(bundle: Path) -> dict[str, Any]:
    """What the bundle says of itself."""
    path = bundle / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != "harness.bundle/1":
            raise InstallError(f"{path}: is of another version of bundles ({found['schema']}): use its own install.sh")
    except FileNotFoundError:
        raise InstallError(f"{path} is missing: copy it beside install.sh, from where the bundle was made") from None
    except (ValueError, KeyError, TypeError):
        raise InstallError(f"{path} is damaged: copy it again") from None
    return found


def check_parts(bundle: Path, parts: list[dict[str, Any]]) -> None:
    """Raises `InstallError` that names every part which is missing or not as it was written."""
    missing, damaged = [], []
    for part in parts:
        path = bundle / part["name"]
        if not path.is_file():
            missing.append(part["name"])
        elif path.stat().st_size != part["bytes"] or sha256(path) != part["sha256"]:
            damaged.append(part["name"])
    said = [f"{len(names)} of {len(parts)} parts {how}: {', '.join(names)}"
            for names, how in ((missing, "missing"), (damaged, "damaged")) if names]  # fmt: skip
    if said:
        raise InstallError(f"{bundle}: {'; '.join(said)}. Copy those again from where the bundle was made")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_host(manifest: dict[str, Any]) -> None:
    """Raises `InstallError` when this machine cannot run what the bundle holds."""
    wanted = manifest["machine"]
    if platform.machine() != wanted:
        raise InstallError(f"this machine is {platform.machine()}, the bundle is for {wanted}: make one for it")
    name, version = platform.libc_ver()
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if name == "glibc" and found < tuple(manifest["glibc"]):
        least = ".".join(map(str, manifest["glibc"]))
        raise InstallError(
            f"this machine has glibc {version}, the bundle needs {least}: make one with --platform "
            f"manylinux_{found[0]}_{found[1]}_{wanted}"
        )
    lacking = []
    for package in manifest["host_packages"]:
        have = version_of(package["name"])
        if have is None or have.split("+")[0] != package["version"].split("+")[0]:
            lacking.append(f"{package['name']} {package['version']} (found: {have or 'none'})")
    if lacking:
        raise InstallError(
            f"{sys.executable} lacks what the bundle was made --without: {', '.join(lacking)}. Say which Python has "
            f"them (PYTHON=/path/to/python3 sh install.sh ...), or make a bundle that carries them"
        )


def version_of(package: str) -> str | None:
    """Version of a package of the Python that runs this; null when it has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def held_by_host(names: list[str]) -> dict[str, str]:
    """Versions, by canonical name, that these packages of the host pin, they themselves or what they need."""
    held: dict[str, str] = {}
    todo, done = list(names), set()
    while todo:
        name = todo.pop()
        if name in done or version_of(name) is None:
            continue
        done.add(name)
        for text in metadata.requires(name) or ():
            needed, _, marker = text.partition(";")
            match = re.match(r"([\w.-]+)[^=<>!~]*(?:==\s*([^\s,)]+))?", needed)
            if match is None or "extra" in marker:
                continue
            todo.append(canonical(match[1]))
            if match[2] and version_of(match[1]) is not None:
                held[canonical(match[1])] = match[2]
    return held


def check_folder(folder: Path, needed_bytes: int) -> None:
    """Raises `InstallError` when the folder holds something, or its disk too little. What we left there goes."""
    if folder.is_dir() and (folder / UNFINISHED).is_file():
        shutil.rmtree(folder)  # of an installation that was killed
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        again = " (an installation of a bundle)" if (folder / MANIFEST).is_file() else ""
        raise InstallError(f"{folder} exists{again}: name another folder, or remove it first: rm -rf '{folder}'")
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise InstallError(
            f"{place} has {free / GB:.1f} GB free, {needed_bytes / GB:.1f} GB are needed: "
            f"name a folder on a larger disk"
        )


def unpack(bundle: Path, manifest: dict[str, Any], folder: Path) -> None:
    """Write the files of the parts below ``folder``, each held to its hash."""
    expected = {file["path"]: file for file in manifest["files"]}
    stream = io.BufferedReader(Joined([bundle / part["name"] for part in manifest["parts"]]), BLOCK)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            file = expected.pop(member.name, None)
            source = archive.extractfile(member) if member.isreg() else None
            if file is None or source is None or ".." in Path(member.name).parts or member.name.startswith("/"):
                raise InstallError(f"{bundle}: holds {member.name!r}, which its {MANIFEST} does not know")
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with path.open("wb") as out:
                while block := source.read(BLOCK):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() != file["sha256"]:
                raise InstallError(f"{bundle}: {member.name} is damaged: copy the bundle again")
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
    if expected:
        raise InstallError(f"{bundle}: lacks {', '.join(sorted(expected))}: copy the bundle again")


def host_folders() -> Iterator[str]:
    """Where the Python that runs this has packages, a virtual environment's own among them."""
    for entry in sys.path:
        if Path(entry).name in ("site-packages", "dist-packages") and Path(entry).is_dir():
            yield entry


def make_environment(folder: Path, manifest: dict[str, Any]) -> None:
    """A virtual environment with the wheels; it sees the packages of this Python only when some are the host's."""
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin" / "python"
    if manifest["host_packages"]:
        # Not system-site-packages: where this Python is itself of an environment, that would be the one below it.
        purelib = subprocess.run(
            [python, "-Ic", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        lines = [f"import site; site.addsitedir({entry!r})" for entry in host_folders()]
        (Path(purelib) / "zz_host_packages.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held = held_by_host([one["name"] for one in manifest["host_packages"]])
    wheels = []
    for path in sorted((folder / "wheels").glob("*.whl")):
        name, version = canonical(path.name.split("-")[0]), path.name.split("-")[1]
        if held.get(name, version) == version:
            wheels.append(path)
        else:
            print(f"not installed: {name} {version}, since packages of this host need its {held[name]}")
    # All of them, also where the host has the same one: it may be updated there, or taken away.
    words = ("install", "--no-index", "--no-deps", "--ignore-installed", "--no-warn-script-location")
    pip(folder, *words, *map(str, wheels))


def pip(folder: Path, *words: str) -> str:
    """What the carried pip printed. Raises `InstallError` with its last lines when it fails."""
    wheel = next((folder / "wheels").glob("pip-*.whl"))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(
        [folder / "bin" / "python", wheel / "pip", *words], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode and words[0] != "check":
        raise InstallError("pip could not install the wheels:\n" + "\n".join(done.stdout.splitlines()[-12:]))
    return done.stdout


def misfits(checked: str, manifest: dict[str, Any]) -> list[str]:
    """Lines of ``pip check`` about a carried package, but for what was left out on purpose."""
    carried, left_out = set(manifest["packages"]), set(manifest["left_out"])
    found = []
    for line in checked.splitlines():
        match = re.match(r"(\S+) \S+ (?:requires|has requirement) ([\w.-]+)", line)
        if match and canonical(match[1]) in carried and canonical(match[2]) not in left_out:
            found.append(line)
    return found


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def install(bundle: Path, folder: Path) -> list[str]:
    """Install into ``folder``, which is removed again when that fails; packages that do not fit each other."""
    manifest = read_manifest(bundle)
    check_parts(bundle, manifest["parts"])
    check_host(manifest)
    check_folder(folder, manifest["disk_bytes"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / UNFINISHED).touch()
        print(f"unpacking {len(manifest['files'])} files", flush=True)
        unpack(bundle, manifest, folder)
        print(f"installing {len(manifest['packages'])} packages into {folder}", flush=True)
        make_environment(folder, manifest)
        problems = misfits(pip(folder, "check"), manifest)
        shutil.rmtree(folder / "wheels")
        (folder / "activate").write_text(
            "# . FOLDER/activate: the harness on PATH, and its weights\n"
            f"export PATH='{folder}/bin':\"$PATH\" HARNESS_CACHE='{folder}/cache' HF_HUB_OFFLINE=1\n",
            encoding="utf-8",
        )
        subprocess.run([folder / "bin" / "harness", "--version"], check=True, timeout=120)
        shutil.copyfile(bundle / MANIFEST, folder / MANIFEST)
        (folder / UNFINISHED).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return problems


def main() -> int:
    """Exit status: 0 installed (or whole, with --check), 1 not; what is wrong is on standard error."""
    parser = argparse.ArgumentParser(
        prog="install.sh", description="Join, check and install this bundle, without a network."
    )
    parser.add_argument("folder", nargs="?", help="where to; a new folder")
    parser.add_argument("--check", action="store_true", help="say whether every part is there and whole, no more")
    asked = parser.parse_args()
    bundle = Path(__file__).resolve().parent
    try:
        if asked.check:
            manifest = read_manifest(bundle)
            check_parts(bundle, manifest["parts"])
            check_host(manifest)
            print(f"{len(manifest['parts'])} parts are whole, and this machine fits")
            return 0
        if not asked.folder:
            parser.error("say where to: sh install.sh FOLDER")
        folder = Path(asked.folder).absolute()
        problems = install(bundle, folder)
    except InstallError as e:
        print(f"install.sh: {e}", file=sys.stderr)
        return 1
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as e:
        print(f"install.sh: {e}; nothing was kept of it", file=sys.stderr)
        return 1
    print(f"installed: . '{folder}/activate' && harness doctor")
    for line in problems:
        print(f"install.sh: installed, but a package does not fit: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
