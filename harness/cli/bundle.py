"""What a host without a network lacks, in parts that can be carried there: bundle."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from pathlib import Path

import click

from harness.cli.output import print_json, say
from harness.cli.verb import JSON_OPTION, command
from harness.errors import EXIT_VALID, UsageError
from harness.option_types import EXISTING, FOLDER, Parsed

_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "MB": 10**6, "GB": 10**9}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]iB|[MG]B)", text)
    size = int(float(match[1]) * _SIZES[match[2]]) if match else 0
    if size < 1 << 20:
        raise UsageError(f"{text!r} is not a size of at least 1 MiB: write 48MiB or 2GB")
    return size


def _python(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"3\.(\d+)", text)
    if match is None or not 11 <= int(match[1]) <= 14:
        raise UsageError(f"{text!r}: write the host's Python like 3.12 (3.11 to 3.14)")
    return 3, int(match[1])


SIZE = Parsed("size", _size, lambda size: f"{size >> 20}MiB")
PYTHON = Parsed("version", _python, lambda version: ".".join(map(str, version)))


@command(
    epilog="""\b
Examples:
  harness bundle -o bundle/                                       the client, for a machine like this one
  harness bundle trace.jsonl --extra cpu --model smollm2-135m -o bundle/
  harness bundle --python 3.12 --platform manylinux_2_39_x86_64 --extra gpu --model smollm2-135m \\
      --without torch==2.11.0,torchvision==0.26.0,torchaudio==2.11.0 --part-size 48MiB -o bundle/

On the host: sh bundle/install.sh FOLDER, then: . FOLDER/activate && harness doctor
pip downloads, by its own settings: PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CONSTRAINT.
""",
)
@click.argument("files", nargs=-1, type=EXISTING)
@click.option(
    "--python", type=PYTHON, default=sys.version_info[:2], show_default="this one's", help="Python of the host."
)
@click.option(
    "--platform", "tag", metavar="TAG", show_default="this machine's",
    help="Newest wheels that the host takes, by its glibc: manylinux_2_28_x86_64.",
)  # fmt: skip
@click.option(
    "--extra", "extras", multiple=True, help="What it is to run: cpu, gpu, cluster; none is the client; repeat."
)
@click.option(
    "--without", multiple=True, metavar="NAME[==VERSION],...",
    help="Packages that the host has already, with all that only they need. Checked there before anything is written.",
)  # fmt: skip
@click.option(
    "--leave-out", multiple=True, metavar="NAME[==VERSION],...",
    help="Packages that nobody needs there although others ask for them.",
)  # fmt: skip
@click.option(
    "--model", "models", multiple=True, help="Weights to carry ('harness models'); NAME:dummy needs none; repeat."
)
@click.option(
    "--part-size", "part_bytes", type=SIZE, default=48 << 20, show_default="48MiB", help="Of a part, at most."
)
@click.option(
    "-o", "--output", "--out", "out", type=FOLDER, default=Path("bundle"), show_default=True, help="A new folder."
)
@JSON_OPTION
def bundle(
    files: tuple[Path, ...], python: tuple[int, int], tag: str | None, extras: tuple[str, ...],
    without: tuple[str, ...], leave_out: tuple[str, ...], models: tuple[str, ...], part_bytes: int, out: Path,
    format_: str,
) -> int:  # fmt: skip
    """Write all that a host without a network lacks: wheels, weights, FILES (traces), and what installs them.

    pip downloads the wheels for the host's Python and platform. They go into parts of at most --part-size, with a
    manifest of hashes; parts may be carried one by one, in any order. install.sh beside them needs a POSIX shell and
    Python: it joins and checks the parts and makes a virtual environment in a folder.
    """
    from harness.cluster.deploy.bundle import BundleSpec, make_bundle
    from harness.cluster.deploy.bundle_wheels import HostPython, Packages, here, parse_packages

    if platform.system() != "Linux" and tag is None:
        raise UsageError("which machine is it for? --platform manylinux_2_28_x86_64, by the host's glibc")
    spec = BundleSpec(
        host=HostPython(python=python, platform=tag or here()),
        packages=Packages(
            extras=extras, on_host=list(parse_packages(without)), left_out=list(parse_packages(leave_out))
        ),
        models=models, files=files, part_bytes=part_bytes,
    )  # fmt: skip
    made = make_bundle(spec, out, say)
    if format_ == "json":
        print_json(made)
        return EXIT_VALID
    size = sum(int(part["bytes"]) for part in made.parts)
    print(f"{out}: {len(made.packages)} packages, {size / 1e6:,.0f} MB in {len(made.parts)} parts")
    for asked, name in made.models.items():
        print(f"model {asked}: on the host --model {name}")
    print(f"on the host: sh {shlex.quote(out.name)}/install.sh FOLDER")
    return EXIT_VALID
