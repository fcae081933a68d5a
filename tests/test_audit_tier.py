"""An audit of MODEL@TIER serves each model once, for both of its passes. Placement is faked, the servers are fakes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import StartServer

from harness.cli import cli
from harness.cli.runner import sweep
from harness.cli.runner.targets import Servers, UrlTarget
from harness.cluster.catalogue.quantise import FILE, Quantised
from harness.cluster.catalogue.tiers import get_tier
from harness.errors import EXIT_INVALID, EXIT_USAGE
from harness.options import ReplayOptions
from harness.record.manifest import RunDir, write_json
from harness.sweep.state import read_state

TIER = "aws-m7a.large"
N = 60


def test_servers_stay_up_from_quality_to_load(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"How much is {i} and 0?", "answers": [f"It is {i}."]} for i in range(N)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(
        json.dumps({"arrival_s": i / 10, "prompt": row["prompt"], "max_tokens": 9,
                    "check": {"type": "number", "value": i}}) + "\n"
        for i, row in enumerate(rows)))  # fmt: skip
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text('{"max_position_embeddings": 64}')
    (small / "model.safetensors").write_bytes(b"x")
    calibrated_on = hashlib.sha256(json.dumps(rows[3]["prompt"]).encode()).hexdigest()
    write_json(small / FILE, Quantised(created="", parent="smollm2-135m", parent_sha256={}, to="int8", group=None,
                                       method="round-to-nearest", seen=[calibrated_on]))  # fmt: skip
    dies = {str(small): ("--die-after", "40")}
    opened: list[str] = []

    class Placed(UrlTarget):
        @contextmanager
        def open(self, run: RunDir) -> Iterator[Servers]:
            opened.append(self.model)
            with super().open(run) as servers:
                yield servers

    def place(options: ReplayOptions) -> Placed:
        model = options.serve.model or ""
        server = fake_server("--model", model, "--answers", str(tmp_path / "answers.jsonl"), "--ttft", "0.08",
                             *dies.get(model, ()))  # fmt: skip
        return Placed([server.url], model, get_tier(TIER))

    monkeypatch.setattr(sweep, "choose_target", place)
    words = ["audit", str(trace), "--current", f"smollm2-135m@{TIER}", "--candidate", f"{small}@{TIER}",
             "--candidate", "mistral-7b-instruct-v0.3@aws-p5.48xlarge", "--slo", "ttft_p95=5s", "--quick",
             "--rate", "100", "-o", str(tmp_path / "audits"),
             "--format", "json"]  # fmt: skip
    done = CliRunner().invoke(cli, words, standalone_mode=False)
    assert done.return_value == EXIT_INVALID, done.output
    found = json.loads(done.stdout)
    assert opened == ["smollm2-135m", str(small)], "one start for each"
    assert found["models"][0]["load"].startswith("100 req/s") and found["models"][0]["accepted"]["value"] == 1
    folder = Path(found["folder"])
    (loads,) = folder.glob("load-*")
    state = read_state(loads)
    assert [point.state for point in state.points] == ["done"] and len(state.rentals) == 1
    # who died while asked is not loaded, and nothing is said of its answers
    verdict = found["answers"][0]["verdict"]
    assert verdict["word"] == "INVALID" and found["models"][1]["load"] == "not loaded"
    notes = " ".join(found["notes"])
    assert "Q4_1 weights expanded" in notes and "int8 of smollm2-135m, not calibrated: the worst int8" in notes
    assert found["graded"] == N - 1 and "1 records are not graded" in notes

    # no such machine here: a candidate by name, of which nothing is claimed
    named, by_name = found["answers"][1]["verdict"], found["models"][2]
    assert named["word"] == "quality not measured" and by_name["load"].startswith("not measured here: ")
    assert by_name["usd_per_request"] is None

    gone = CliRunner().invoke(cli, [*words[:5], f"./nowhere@{TIER}", *words[6:]])
    assert "nowhere/config.json" in str(gone.exception) and gone.exception.exit_code == EXIT_USAGE  # type: ignore[union-attr]
