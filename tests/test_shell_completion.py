"""Completion as a shell has it: the script that is printed is the one that is installed, and it completes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, harness

from harness.cli.completion import SHELLS, script


def test_the_installed_scripts_are_the_printed_ones() -> None:
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    files = {folder: ROOT / name for folder, (name,) in installed.items() if "/" in folder}
    for shell, folder in {
        "bash": "share/bash-completion/completions", "fish": "share/fish/vendor_completions.d",
        "zsh": "share/zsh/site-functions",
    }.items():  # fmt: skip
        assert files[folder].read_text() == script(shell), f"harness completion {shell} > {files[folder]}"
        assert files[folder].name in ("_harness", f"harness.{shell}"), "the name that the shell looks for"


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_is_one_of_its_shell(shell: str, tmp_path: Path) -> None:
    done = harness("completion", shell)
    assert done.returncode == 0 and done.stdout == script(shell)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    file = tmp_path / "script"
    file.write_text(done.stdout)
    subprocess.run([shell, "-n", file], check=True, timeout=60)


def test_bash_completes_verbs_options_and_values(tmp_path: Path) -> None:
    tool = tmp_path / "harness"
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness "$@"\n')
    tool.chmod(0o755)
    ask = """PATH="$1:$PATH"; complete() { :; }; source "$2"; shift 2
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _harness_completion harness "${COMP_WORDS[COMP_CWORD]}"
    echo "${COMPREPLY[*]}\""""

    def completed(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", ask, "bash", tmp_path, ROOT / "harness/shell/harness.bash", "harness", *words],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout.split()

    assert completed("rep") == ["replay", "report"]
    assert completed("export", "--to", "") == ["otel", "mlflow"]
    assert completed("replay", "--jun") == ["--junit"]
