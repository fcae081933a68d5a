"""Every command in the documents runs, or says why it does not; verbs and options of all of them exist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import click
import pytest

from harness.cli import cli
from tests.conftest import ROOT, StartServer
from tests.documents import PAGES, REASONS, blocks, commands

SERVER = "http://10.0.0.5:8000/v1"
"""The user's server, in every document."""
ELSEWHERE = [
    ROOT / name for name in (
        "README.md", "CONTRIBUTING.md", "analysis/METRICS.md", "analysis/INTERVALS.md", "analysis/PRICES.md",
        "cluster/README.md", "harness/checks/CHECKS.md", "scenarios/traces/README.md",
    )
]  # fmt: skip
DECIDED = (0, 3, 4, 5)
"""A busy machine may make a run INVALID or too slow for its SLO. A command that is wrong ends with 1 or 2."""


def run_commands(script: str, folder: Path, path: Path) -> None:
    """Run a shell script in ``folder``, with the `harness` of this tree."""
    path.mkdir()
    accepted = "|".join(map(str, DECIDED))
    tool = path / "harness"
    tool.write_text(
        f'#!/bin/sh\n"{sys.executable}" -m harness "$@"\ncode=$?\ncase $code in {accepted}) exit 0;; esac\nexit $code\n'
    )
    tool.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "HARNESS_MIN_REQUESTS": "10",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_run_in_order(page: Path, fake_server: StartServer, tmp_path: Path, a_run: Path) -> None:
    scripts = [block.text for block in blocks(page.read_text()) if block.language == "bash" and block.reason is None]
    if not scripts:
        return
    folder = tmp_path / "here"
    shutil.copytree(a_run, folder)
    if page.stem == "capacity":  # whose search needs more of a day than three seconds
        (folder / "trace.jsonl").write_bytes((ROOT / "scenarios" / "traces" / "azure-conv-2023.csv").read_bytes())
    script = "\n".join(scripts)
    if SERVER in script:
        script = script.replace(SERVER, fake_server("--ttft", "0.02", "--itl", "0.001", "--model", "mistral-7b").url)
    run_commands(script, folder, tmp_path / "bin")


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page begins in: a trace, and a run."""
    folder = tmp_path_factory.mktemp("a-run") / "here"
    folder.mkdir()
    with (folder / "trace.jsonl").open("w") as out:
        for k in range(60):
            row = {
                "arrival_s": k / 20,
                "input_tokens": 100 + 7 * k,
                "output_tokens": 20 + k % 7,
                "session_id": str(k % 20),
            }
            out.write(json.dumps(row) + "\n")
    run_commands(
        "harness simulate trace.jsonl --model mistral-7b-instruct-v0.3 --tier aws-g6e.xlarge -q", folder,
        folder.parent / "bin",
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("page", [*PAGES, *ELSEWHERE], ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_and_options_exist(page: Path) -> None:
    for words in commands(page.read_text()):
        command, rest, context = cast(click.Command, cli), words, click.Context(cli)
        while isinstance(command, click.Group) and rest and not rest[0].startswith(("-", "...")):
            if command.name == "audit" and rest[0] not in command.commands:
                rest = ["run", *rest]  # which may be left out
            found = command.get_command(context, rest[0])
            assert found is not None, f"{page}: no verb: harness {' '.join(words)}"
            command, rest = found, rest[1:]
        command.make_parser(click.Context(command)).parse_args([word for word in rest if word != "..."])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_does_not_run_says_why(page: Path) -> None:
    for block in blocks(page.read_text()):
        assert block.language, (
            f"{page}:{block.line}: a block needs a language (bash is run; text, json, toml ... are not)"
        )
        if block.reason is not None:
            assert block.language == "bash" and block.reason.startswith(REASONS), f"{page}:{block.line}: {block.reason}"
        elif block.language not in ("bash", "python"):
            assert not any(True for _ in commands(block.text)), f"{page}:{block.line}: a command that is not run"
