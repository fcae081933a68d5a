"""The command line with the known-truth server in place of vLLM: ``python -m hosts.driver [--itl S] VERB ...``.

Everything else is the real thing: Ray, placement, actors, load workers, the record, the verdict.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness.cluster.deploy.deployment
from harness.cli import main
from harness.cli.runner.targets import LocalTarget
from harness.cluster.catalogue.models import DEFAULT_MODEL
from harness.cluster.engines.protocol import WHOLE, Command, CommandEngine, Part
from harness.plan.prompts import Vocabulary

CLASH = os.environ.get("TEST_CLASH", "")


class Engine(CommandEngine):
    """With TEST_CLASH=FOLDER, which the first to start makes: the meeting port of its parts was taken meanwhile."""

    __slots__ = ()

    def command(self, host: str, port: int, api_key: str, part: Part = WHOLE) -> Command:
        command = CommandEngine.command(self, host, port, api_key, part)
        if part.rank or not CLASH:
            return command
        clash = f"if mkdir {CLASH}; then echo Address already in use: {part.master_port}; exit 1; fi; exec "
        return replace(command, argv=["sh", "-c", clash + shlex.join(command.argv)])


ENGINE = (Engine if CLASH else CommandEngine)(
    name=os.environ.get("TEST_ENGINE", "vllm-cpu"),
    hosts=int(os.environ.get("TEST_PARTS", "1")),
    served_model=DEFAULT_MODEL,
    argv=(
        sys.executable, "-m", "harness.cluster.engines.fake.server", "--model", DEFAULT_MODEL, "--ttft", "0.02",
        "--itl", os.environ.get("TEST_ITL", "0.01"), "--host", "{host}", "--port", "{port}",
    ),
    api_key_env="FAKE_SERVER_API_KEY",
)  # fmt: skip


def no_weights(self: Any) -> Path:
    """The fake server has none."""
    return Path("/nowhere")


def vocabulary(self: Any) -> Vocabulary:
    """Any ids will do."""
    return Vocabulary.from_ids(set(range(100, 5000)), name="fake")


if __name__ == "__main__":
    harness.cluster.deploy.deployment.VllmEngine = lambda **options: ENGINE  # type: ignore[assignment, misc]
    LocalTarget.weights = no_weights  # type: ignore[method-assign]
    LocalTarget.vocabulary = vocabulary  # type: ignore[method-assign]
    main()
