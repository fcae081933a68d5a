"""A bundle for a host without a network: made from the index at hand, installed and used where there is no network."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT, harness
from packaging.requirements import Requirement

from harness.cluster.deploy import install_bundle
from harness.cluster.deploy.bundle_wheels import (
    HostPython,
    Packages,
    download,
    here,
    own_wheel,
    parse_packages,
    read_wheel,
    roots,
)
from harness.errors import HarnessError, UsageError

TRACE = ROOT / "scenarios" / "traces" / "azure-conv-2023.csv"
ON_HOST = ("boto3", "gevent", "locust", "numpy", "pyarrow", "tokenizers")
"""The heavy packages of the client: those are the host's in these tests."""


def repack(name: str, into: Path) -> None:
    """A wheel of an installed package, from what its RECORD lists."""
    dist = metadata.distribution(name)
    tag = re.search(r"^Tag: (.*)$", dist.read_text("WHEEL") or "", re.MULTILINE)
    assert tag
    with zipfile.ZipFile(into / f"{name.replace('-', '_')}-{dist.version}-{tag[1]}.whl", "w") as archive:
        for file in dist.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts and file.locate().is_file():  # type: ignore[union-attr]
                archive.write(str(file.locate()), str(file))


def offline(argv: Sequence[str | Path], **env: str) -> subprocess.CompletedProcess[str]:
    """Run where nothing but this machine's loopback can be reached, if the kernel lets us."""
    whole = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HARNESS_CACHE")} | env
    away = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*away, "true"], capture_output=True, check=False).returncode:
        away = []
    return subprocess.run(
        [*away, *map(str, argv)], env=whole, capture_output=True, text=True, timeout=280, check=False, cwd="/"
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the client, whose wheels are made from the packages of this environment."""
    folder = tmp_path_factory.mktemp("bundle")
    wheels = folder / "index"
    wheels.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo, done = ["pip", *(Requirement(text).name for text in project["dependencies"])], set(ON_HOST)
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        for requirement in map(Requirement, metadata.requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
        repack(name, wheels)
    without = ",".join(f"{name}=={metadata.version(name)}" for name in ON_HOST)
    made = harness(
        "bundle", str(TRACE), "--without", without, "--part-size", "1MiB", "--model", "llama-2-7b-chat:dummy",
        "-o", str(folder / "out"),
        PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels), PIP_NO_BUILD_ISOLATION="false",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "model llama-2-7b-chat:dummy: on the host --model llama-2-7b-chat:dummy" in made.stdout
    return folder / "out"


def install(bundle: Path, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return offline(["sh", bundle / "install.sh", folder], **{"PYTHON": sys.executable, **env})


def test_a_client_is_installed_and_used_without_a_network(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert {"llm-harness", "click", "pip"} <= manifest["packages"].keys()
    assert not manifest["packages"].keys() & {*ON_HOST, "botocore"}, "nor what only they need"
    assert {one["name"] for one in manifest["host_packages"]} == set(ON_HOST)
    assert len(manifest["parts"]) > 3
    assert all(part["bytes"] <= 1 << 20 for part in manifest["parts"])
    folder = tmp_path / "a folder"
    done = install(bundle, folder)
    assert done.returncode == 0, done.stderr
    assert f"installed: . '{folder}/activate'" in done.stdout
    assert not (folder / "wheels").exists()
    used = tmp_path / "use.sh"
    used.write_text(
        f"""ip link set lo up 2>/dev/null
        . '{folder}/activate'
        python -m harness.cluster.engines.fake.server --port 0 --ttft 0.01 --itl 0.001 > ready &
        while ! grep -q ready ready; do sleep 0.05; done
        harness replay '{folder}/files/{TRACE.name}' --limit 12 --concurrency 4 --min-requests 1 --format json \\
            --base-url "$(sed 's/ready //' ready)" > run.json 2> run.log
        echo "exit $?"
        kill $!
        python -c 'import harness; print(harness.__file__)'
        """
    )
    done = offline(["sh", "-c", f"cd '{tmp_path}' && exec sh use.sh"])
    assert "exit 0" in done.stdout, (tmp_path / "run.log").read_text()
    assert str(folder) in done.stdout.splitlines()[-1]
    assert json.loads((tmp_path / "run.json").read_text())["requests"]["succeeded"] == 12


def broken(bundle: Path, copy: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the bundle, its parts links, with something changed."""
    copy.mkdir()
    for path in bundle.iterdir():
        if path.name.startswith("part-"):
            (copy / path.name).symlink_to(path)
        else:
            shutil.copy(path, copy)
    change(copy)
    return copy


def damage(bundle: Path) -> None:
    part = bundle / "part-002"
    data = bytearray(part.read_bytes())
    data[1000] ^= 1
    part.unlink()
    part.write_bytes(data)


def lose(bundle: Path) -> None:
    (bundle / "part-001").unlink()
    (bundle / "part-003").unlink()


def say(key: str, value: object) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle / "bundle.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage, r"1 of \d+ parts damaged: part-002\. Copy those again"),
        (lose, r"2 of \d+ parts missing: part-001, part-003\."),
        (lambda bundle: (bundle / "bundle.json").write_text("{"), r"bundle\.json is damaged: copy it again"),
        (lambda bundle: (bundle / "bundle.json").unlink(), r"bundle\.json is missing: copy it beside install\.sh"),
        (say("machine", "riscv64"), r"this machine is \w+, the bundle is for riscv64"),
        (say("glibc", [2, 999]), r"the bundle needs 2\.999: make one with --platform manylinux_2_\d+_"),
        (say("disk_bytes", 10**18), r"GB free, 1000000000\.0 GB are needed: name a folder on a larger disk"),
        (say("host_packages", [{"name": "torch", "version": "1.0"}]), r"was made --without: torch 1\.0 \(found: "),
        (say("files", []), r"holds '.*', which its bundle\.json does not know"),
        (say("schema", "harness.bundle/9"), r"another version of bundles \(harness\.bundle/9\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_is_left(
    bundle: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    done = install(broken(bundle, tmp_path / "copy", change), tmp_path / "to")
    assert done.returncode == 1
    assert re.search(words, done.stderr), done.stderr
    assert not (tmp_path / "to").exists()


def test_another_python_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "python3"
    other.write_text("#!/bin/sh\necho 3.9\n")
    other.chmod(0o755)
    done = install(bundle, tmp_path / "to", PYTHON=str(other))
    assert done.returncode == 1
    own = ".".join(map(str, sys.version_info[:2]))
    assert f"this bundle is for Python {own}, which was not found, {other} is 3.9: PYTHON=/path/" in done.stderr


def test_a_folder_that_holds_something_stays_as_it_is(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    done = install(bundle, tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} exists: name another folder, or remove it first" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_parts_are_checked_as_they_come(bundle: Path, tmp_path: Path) -> None:
    check = ["sh", bundle / "install.sh", "--check"]
    assert "parts are whole, and this machine fits" in offline(check, PYTHON=sys.executable).stdout
    copy = broken(bundle, tmp_path / "copy", lose)
    done = offline(["sh", copy / "install.sh", "--check"], PYTHON=sys.executable)
    assert done.returncode == 1
    assert "parts missing" in done.stderr


# --- what is carried


def wheel(folder: Path, name: str, version: str, *requires: str, extras: Sequence[str] = ()) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    said = [f"Requires-Dist: {text}" for text in requires] + [f"Provides-Extra: {extra}" for extra in extras]
    with zipfile.ZipFile(path, "w") as archive:
        info = f"{name}-{version}.dist-info"
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *said])
        archive.writestr(f"{info}/METADATA", text + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


OTHER = HostPython(python=(3, 14) if sys.version_info[:2] != (3, 14) else (3, 13), platform="manylinux_2_39_x86_64")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made-up packages, the only index that pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel(folder, "pip", "99.0")
    own = "python_version == '" + ".".join(map(str, OTHER.python)) + "'"
    wheel(folder, "engine", "1.0", "torch==2.11.0", "kernels", "small", f"theirs[deep]>=1; {own}")
    wheel(folder, "engine", "2.0", "torch==2.12.0", "kernels", "small")
    for version in ("2.11.0", "2.12.0"):
        wheel(folder, "torch", version, "cuda", f"triton[x]==3.{version[2]}")
    for name, version in (("cuda", "1.0"), ("kernels", "1.0"), ("small", "1.0"), ("deep", "1.0"), ("triton", "3.9")):
        wheel(folder, name, version)
    wheel(folder, "small", "1.1", "triton")
    wheel(folder, "theirs", "1.5", f"deep; extra == 'deep' and {own}", extras=["deep"])
    return folder


def carried(index: Path, work: Path, **packages: object) -> tuple[dict[str, str], list[dict[str, str]]]:
    own = wheel(work, "llm_harness", "0.1", "engine; extra == 'gpu'", "llm-harness[gpu]; extra == 'all'",
                extras=["gpu", "all"])  # fmt: skip
    found, needed = download(OTHER, own, Packages(**packages), work, lambda text: None)  # type: ignore[arg-type]
    return {one.name: one.version for one in map(read_wheel, found)}, needed


def test_what_the_host_has_decides_which_engine_is_carried(index: Path, tmp_path: Path) -> None:
    """Neither torch nor what only torch needs; and what this Python's markers hide from pip is found."""
    found, needed = carried(index, tmp_path, extras=["all"], on_host=list(parse_packages(["torch==2.11.0"])),
                            left_out=list(parse_packages(["kernels"])))  # fmt: skip
    expected = {"llm-harness": "0.1", "engine": "1.0", "small": "1.1", "theirs": "1.5", "deep": "1.0", "pip": "99.0"}
    assert found == expected
    assert needed == [{"name": "torch", "version": "2.11.0"}, {"name": "triton", "version": "3.1"}], "which torch pins"


def test_without_a_version_the_newest_that_fits_is_asked_of_the_host(index: Path, tmp_path: Path) -> None:
    found, needed = carried(index, tmp_path, extras=["gpu"], on_host=list(parse_packages(["torch"])))
    assert found == {
        "llm-harness": "0.1",
        "engine": "2.0",
        "small": "1.1",
        "kernels": "1.0",
        "triton": "3.9",
        "pip": "99.0",
    }
    assert needed == [{"name": "torch", "version": "2.12.0"}]


def test_what_cannot_be_had_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--extra nothing: the harness has gpu, all"):
        carried(index, tmp_path, extras=["nothing"])
    for path in index.glob("small-*"):
        path.unlink()
    (index / "engine-1.0-py3-none-any.whl").unlink()
    (tmp_path / "again").mkdir()
    with pytest.raises(HarnessError, match=r"(?s)No matching distribution found for small.*newer glibc"):
        carried(index, tmp_path / "again", extras=["gpu"])


def test_what_packages_of_the_host_pin_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        "torch": ["triton==3.6.0; platform_system == 'Linux'", "cuda-toolkit[nvrtc]==13.0.2", "sympy>=1.13",
                  "optree==0.1; extra == 'optree'", "absent==1"],
        "cuda-toolkit": ["nvidia_cuda.nvrtc (==13.0.88)"], "triton": [], "sympy": ["mpmath==1.3"],
        "nvidia-cuda-nvrtc": [], "mpmath": [], "optree": [],
    }  # fmt: skip
    monkeypatch.setattr(
        install_bundle, "version_of", lambda name: "1" if install_bundle.canonical(name) in needs else None
    )
    monkeypatch.setattr(install_bundle.metadata, "requires", needs.__getitem__)
    held = {"triton": "3.6.0", "cuda-toolkit": "13.0.2", "nvidia-cuda-nvrtc": "13.0.88", "mpmath": "1.3"}
    assert install_bundle.held_by_host(["torch"]) == held


def test_a_platform_is_every_older_one_too() -> None:
    tags = HostPython(python=(3, 12), platform="manylinux_2_28_x86_64").platforms
    assert {"manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= set(tags)
    assert "manylinux_2_31_x86_64" not in tags
    assert HostPython(python=(3, 12), platform=here()).glibc >= (2, 17)
    with pytest.raises(UsageError, match="write manylinux_MAJOR_MINOR_MACHINE with the host's glibc"):
        HostPython(python=(3, 12), platform="musllinux_1_2_x86_64").check()


def test_a_host_of_another_machine_gets_the_reader_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    built = own_wheel(HostPython(python=(3, 12), platform=f"manylinux_2_28_{other}"), tmp_path)
    assert built.name.endswith("-py3-none-any.whl")


def test_requirements_are_those_of_the_host(tmp_path: Path) -> None:
    facts = read_wheel(wheel(tmp_path, "x", "1", "a; python_version < '3.12'", "b; platform_machine == 'aarch64'", "c"))
    host = HostPython(python=(3, 12), platform="manylinux_2_28_aarch64")
    assert [str(one) for one in roots(facts, (), host.environment)] == ["b", "c"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--python", "2.7"], "write the host's Python like 3.12"),
        (["--part-size", "9"], "is not a size of at least 1 MiB"),
        (["--platform", "win_amd64"], "--platform win_amd64: write manylinux_"),
        (["--without", "=="], "'==' is not a package"),
        (["--model", "nothing"], "unknown model"),
        (["nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_is_downloaded(words: list[str], said: str, tmp_path: Path) -> None:
    done = harness("bundle", *words, "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert said in done.stderr
    assert not list((tmp_path / "out").glob("*"))
