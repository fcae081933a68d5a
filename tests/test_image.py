"""The container images, as far as can be seen without building them (`make image` does, and runs what it built)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SHIPPED = ("client", "cpu", "gpu")


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """name -> (what it is made from, its instructions)"""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    plain = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    for line in plain.splitlines():
        if made := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[made[2]] = (made[1], here := [])
        elif line and found:
            word, _, rest = line.partition(" ")
            here.append((word, " ".join(rest.split())))
    return found


def test_the_linter_has_nothing_to_say() -> None:
    said = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", "--no-color", "-"],
        input=DOCKERFILE, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SHIPPED)
def test_an_image_is_the_harness_run_by_nobody_of_note(name: str) -> None:
    _, does = stages()[name]
    last = dict(does)
    assert last["USER"] == "1000:1000", "a number, so that Kubernetes can see that it is not root"
    assert (last["ENTRYPOINT"], last["CMD"], last["WORKDIR"]) == ('["harness"]', '["--help"]', "/work")
    assert [word for word, _ in does][-4:] == ["USER", "WORKDIR", "ENTRYPOINT", "CMD"], "nothing is made as root after"


def test_a_build_without_a_target_makes_the_client_on_a_base_of_your_choice() -> None:
    made = stages()
    assert list(made)[-1] == "client"
    assert made["client"][0] == made["cpu"][0] == "python" and made["python"][0] == "${BASE}"
    assert made["gpu"][0] == "${GPU_BASE}"
    before = DOCKERFILE[: DOCKERFILE.index("\nFROM")]
    assert re.search(r"^ARG BASE=\S+\nARG GPU_BASE=\S+:v\d\S+$", before, re.MULTILINE)


def test_no_secret_can_get_into_a_layer() -> None:
    assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD|--mount=type=secret", re.sub(r"(?m)^#.*", "", DOCKERFILE))
    copied = [rest for _, does in stages().values() for word, rest in does if word in ("COPY", "ADD")]
    assert [rest for rest in copied if not rest.startswith("--from=build")] == [". ."]
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*", "what may go in is listed, not what may not"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert allowed == {
        "LICENSE", "README.md", "pyproject.toml", "setup.py", "harness", "analysis", "cluster", "scenarios",
    }  # fmt: skip
    assert {"**/.env*", "**/*.so"} <= set(ignored[-3:])


def test_what_kuberay_calls_is_in_the_images_of_a_cluster() -> None:
    """Its probes are `wget` of an agent that only ``ray[default]`` has, in a login shell that sets PATH anew."""
    made = stages()
    for name in ("cpu", "gpu"):
        assert any(word == "RUN" and re.search(r"install\b.*\bwget\b", rest) for word, rest in made[name][1])
    for name in ("build-cpu", "gpu"):
        assert any("'ray[default]'" in rest for _, rest in made[name][1])
    assert any("/opt/harness/bin/ray /usr/local/bin/" in rest for _, rest in made["cpu"][1])


def test_what_is_run_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", ROOT / "tests/image/build.sh"], check=True, timeout=60)
