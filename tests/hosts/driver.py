"""The command line with the known-truth server in place of vLLM: ``python -m hosts.driver [--itl S] VERB ...``.

Everything else is the real thing: Ray, placement, actors, load workers, the record, the verdict.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import cluster.deployment
from cluster.engine import CommandEngine
from cluster.models import DEFAULT_MODEL
from harness.cli import main
from harness.commands.targets import LocalTarget
from harness.prompts import Vocabulary

ENGINE = CommandEngine(
    name=os.environ.get("TEST_ENGINE", "vllm-cpu"),
    hosts=int(os.environ.get("TEST_PARTS", "1")),
    served_model=DEFAULT_MODEL,
    argv=(
        sys.executable, "-m", "cluster.fake_server", "--model", DEFAULT_MODEL, "--ttft", "0.02",
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
    cluster.deployment.VllmEngine = lambda **options: ENGINE  # type: ignore[assignment, misc]
    LocalTarget.weights = no_weights  # type: ignore[method-assign]
    LocalTarget.vocabulary = vocabulary  # type: ignore[method-assign]
    main()
