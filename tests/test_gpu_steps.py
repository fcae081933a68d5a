"""The steps for a host with a GPU (tests/gpu), rehearsed on the simulated engine: no figure here is of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

from harness.cluster.catalogue.tiers import get_tier, write_tiers
from harness.record.host import describe_host
from tests.gpu.__main__ import as_here, outcome, pack, run_step
from tests.gpu.steps import LIMIT_S, STEPS, TRACE, Ask, Step


def steps(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.gpu", "--rehearse", "simulated", "-o", str(folder / "out"), "--work",
            str(folder / "work"), *words]  # fmt: skip
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def test_a_step_is_run_archived_and_not_run_again(tmp_path: Path) -> None:
    done = steps(tmp_path, "--only", "2", "6", "--budget", "7m")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2-mistral-bf16: done in" in done.stdout
    assert "left: 6-capacity (8 min): Mistral 7B bf16: capacity at" in done.stdout, "8 do not fit into 7 minutes"
    assert "REHEARSED: no figure is of a GPU" in done.stdout
    said = outcome(tmp_path / "out" / "2-mistral-bf16.tar.xz")
    assert said is not None
    assert [row["in_flight"] for row in sorted(said["rows"], key=lambda row: row["in_flight"])] == [1, 8, 32]
    assert {row["evidence"] for row in said["rows"]} == {"simulated"}
    assert all(row["verdict"] == "VALID" and row["usd_per_1m_total"] > 0 for row in said["rows"])
    assert said["tier"]["date"], "of the price"
    assert {"harness", "python", "pyarrow"} <= said["versions"].keys()
    with tarfile.open(tmp_path / "out" / "2-mistral-bf16.tar.xz") as archive:
        names = archive.getnames()
    assert sum(name.endswith(".arrows") and "/results-" in name for name in names) == 3, "rows are kept"
    again = steps(tmp_path, "--only", "2")
    assert "2-mistral-bf16: kept, from" in again.stdout
    assert again.returncode == 0


def test_a_step_is_cut_at_its_limit_and_says_so(tmp_path: Path) -> None:
    said = run_step(STEPS[0], Ask(tier="runpod-h200", work=tmp_path, rehearse="simulated"), limit_s=45.0)
    assert said["outcome"] == "cut"
    assert [command["exit"] for command in said["commands"]] == [None, None]
    assert said["rows"] == []


def test_a_host_smaller_than_the_instance_keeps_its_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a server half of the tier's memory, which a partitioned host may not have."""
    own, here = tmp_path / "tiers.toml", describe_host()
    write_tiers(own, [as_here(get_tier("runpod-h200"))])
    monkeypatch.setenv("HARNESS_TIERS", str(own))
    tier = get_tier("runpod-h200")
    assert (tier.vcpu, tier.memory_gib) == (here.cores, here.memory_gib)
    assert (tier.usd_per_hour, tier.date, tier.accelerator_memory_gib) == (4.59, "2026-10-07", 141.0)
    assert tier.note and tier.note.endswith("the instance of this price has 24 and 276 GiB")


def test_an_archive_leaves_out_what_can_be_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "1-step"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "results-0.arrows").write_bytes(b"rows" * 100)
    (folder / "run" / "plan.arrow").write_bytes(bytes(range(256)) * 4000 + Path(__file__).read_bytes())
    (folder / "api-key").write_text("secret")
    archive = tmp_path / "1-step.tar.xz"
    assert pack(folder, archive) == []
    whole = archive.stat().st_size
    assert pack(folder, archive, most=whole - 1) == ["plan.arrow"]
    with tarfile.open(archive) as found:
        assert found.getnames() == ["1-step/run/results-0.arrows"]
    with pytest.raises(Exception, match="its rows alone are larger"):
        pack(folder, archive, most=10)
    assert outcome(archive) is None, "no step.json in it: the step did not end"


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_fits_and_asks_for_what_exists(step: Step, tmp_path: Path) -> None:
    """The command lines are parsed by the verbs themselves; on a CPU a small model stands in, on one tier's price."""
    from harness.cli import cli
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.engines.vllm import misfit

    assert step.minutes * 60 <= LIMIT_S
    for name in step.models:
        model = get_model(name)
        assert model.dummy
        assert misfit(model, get_tier("runpod-h200")) is None
    for rehearse in (None, "cpu"):
        commands = step.commands(Ask(tier="runpod-h200", work=tmp_path, rehearse=rehearse), tmp_path / step.name)
        for words in (argv[3:] for argv in commands if argv[1:3] == ["-m", "harness"]):
            verb = cli.get_command(None, words[0])  # type: ignore[arg-type]
            context = verb.make_context(words[0], list(words[1:]))  # type: ignore[union-attr]
            if rehearse == "cpu" and words[0] != "doctor":
                assert context.params["model"].startswith("smollm2-135m")
                assert context.params["tier"] == "aws-m7a.large"
    assert len(STEPS) <= 8


def test_all_models_get_the_same_load(tmp_path: Path) -> None:
    STEPS[1].commands(Ask(tier="runpod-h200", work=tmp_path), tmp_path / "x")
    kept = (tmp_path / "trace.csv").read_text().splitlines()
    whole = TRACE.read_text().splitlines()
    assert kept[0] == whole[0]
    assert 0.9 < len(kept) / len(whole) < 1
    assert all(sum(map(int, line.split(",")[1:])) <= 4000 for line in kept[1:])
    assert json.loads(json.dumps([step.name for step in STEPS])) == sorted(step.name for step in STEPS)
