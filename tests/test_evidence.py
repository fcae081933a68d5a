"""What an engine says of itself reaches every figure: a run recorded without a server, for a stub engine."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from run_files import good, write_run

from harness.cli import cli
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.protocol import CommandEngine, Engine
from harness.errors import UsageError
from harness.plan.file import plan_sha256, read_plan_info
from harness.record.manifest import RunDir, ServedBy, Worker, new_manifest, read_manifest, write_manifest
from harness.record.run_spec import RunSpec

TIER = get_tier("aws-m7a.large")
STUB = CommandEngine(
    name="stub", served_model="m", argv=("nothing",), evidence="simulated", tiers=("aws-m7a.large", "aws-g6.xlarge")
)


def record(path: Path, engine: Engine) -> Path:
    """A run directory from data alone: no server is asked, and none exists."""
    run = RunDir(write_run(path, [good(i) for i in range(60)]))
    spec = RunSpec(mode="open", model=engine.served_model, base_urls=[], slo={"ttft": 2.0})
    system = ServedBy(engine=engine.name, evidence=engine.evidence, model=engine.served_model, tier=TIER)
    manifest = new_manifest(path.name, spec, read_plan_info(run.plan), plan_sha256(run.plan), system, replicas=[])
    manifest.status = "complete"
    manifest.workers = [Worker(index=0, rows=60, cpu_share=0.2, loop_lag_p99_s=0.001)]
    write_manifest(run, manifest)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("runs") / "simulated", STUB)


def harness(*args: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    assert done.exception is None, (done.output, done.exception)
    return done.stdout


def test_a_run_is_recorded_without_servers(run: Path) -> None:
    manifest = read_manifest(run)
    assert (manifest.evidence, manifest.engine, manifest.replicas) == ("simulated", "stub", [])
    assert manifest.host.cores and manifest.versions["harness"]


def test_every_figure_of_a_simulated_run_says_so(run: Path) -> None:
    report = json.loads(harness("report", run, "--format", "json"))
    kinds: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, dict):
            if "value" in value and "evidence" in value:
                kinds.add(str(value["evidence"]))
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(report)
    assert "simulated" in kinds and "simulated x list price" in kinds
    assert not {kind for kind in kinds if kind.startswith("measured")}


def test_text_page_export_and_price_say_so(run: Path, tmp_path: Path) -> None:
    assert "simulated" in harness("report", run)
    harness("report", run, "--html", tmp_path / "page.html")
    assert "simulated" in (tmp_path / "page.html").read_text()
    harness("export", run, "-o", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        assert {row["evidence"] for row in csv.DictReader(file)} == {"simulated"}
    price = json.loads(harness("price", run, "--format", "json"))
    assert "simulated" in json.dumps(price)
    assert "simulated" in harness("price", run)
    assert '"measured"' not in json.dumps(price)


def test_an_engine_says_which_tiers_it_fits(tmp_path: Path) -> None:
    assert STUB.misfit(TIER) is None
    assert STUB.misfit(get_tier("aws-p5.48xlarge")) == (
        "stub does not run on tier aws-p5.48xlarge: choose aws-m7a.large or aws-g6.xlarge"
    )
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray: pip install -e '.[cluster]'")
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.deploy.deployment import Deployment

    model = get_model("smollm2-135m")
    start = {"model": model, "weights": tmp_path, "replicas": 1, "run_dir": tmp_path, "api_key": "k", "engine": STUB}
    with pytest.raises(UsageError, match="does not run on tier aws-p5"):
        Deployment(tier=get_tier("aws-p5.48xlarge"), **start)
    assert Deployment(tier=TIER, **start).evidence == "simulated"
