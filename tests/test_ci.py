"""What CI sees: JUnit XML with the verdicts' own meaning, and an action whose shell passes inputs on unrun."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from run_files import SPEC, bad, good, write_run

from harness.analysis.compare.compare import compare, parse_gate
from harness.analysis.compare.paired import observe
from harness.analysis.report.junit import Case, Suite, render_junit, suite_of_comparison, suite_of_run
from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.cli import cli

SCHEMA = ROOT / "tests/schemas/github-action.json"
"""Of SchemaStore (Apache 2.0), as check-jsonschema 0.39.0 carries it."""
SCHEMA_SHA256 = "224326cc5a334bdb97b56b6fc320cd4381ba7d61b477b425ed506e6a420b52ba"


def suite(path: Path, rows: list[Any], slo: dict[str, float], least: int = 30) -> Suite:
    spec = replace(SPEC, slo=slo, min_requests=least)
    return suite_of_run(summarise(read_run(write_run(path, rows, spec=spec))))


def results(found: Suite) -> dict[str, str]:
    return {case.name: case.result for case in found.cases}


def test_each_limit_of_an_slo_is_a_case(tmp_path: Path) -> None:
    rows = [good(i, ttft_ms=50, itl_ms=10) for i in range(400)]
    found = results(suite(tmp_path / "run", rows, {"ttft_p95": 1.0, "tpot_p95": 0.001}))
    assert found == {"verdict": "passed", "SLO: ttft_p95 <= 1 s": "passed", "SLO: tpot_p95 <= 1 ms": "failure"}


def test_what_was_not_decided_is_no_pass(tmp_path: Path) -> None:
    rows = [good(i) for i in range(20)]
    assert set(results(suite(tmp_path / "small", rows, {"ttft": 9.0})).values()) == {"skipped"}
    broken = [*(good(i) for i in range(50)), *(bad(50 + i) for i in range(60))]
    found = results(suite(tmp_path / "invalid", broken, {"ttft": 9.0}))
    assert found["verdict"] == "error" and found["SLO: ttft <= 9 s for 99 % of requests"] == "skipped"


def side(folder: Path, scale: float) -> list[Any]:
    made = []
    for seed in range(3):
        rows = [good(i, ttft_ms=(50 + (i * 7 + seed) % 20) * scale) for i in range(200)]
        run = read_run(write_run(folder / str(seed), rows, spec=replace(SPEC, slo={"ttft": 1.0})))
        summary = summarise(run)
        made.append(observe(run, replace(summary, plan=replace(summary.plan, seed=seed))))
    return made


def test_each_condition_is_a_case(tmp_path: Path) -> None:
    gates = [parse_gate(text) for text in ("ttft_p95 > +10%", "ttft_p95 > +300%", "cost > +5%")]
    found = results(suite_of_comparison(compare(side(tmp_path / "a", 1), side(tmp_path / "b", 2), gates)))
    assert [found.pop(next(name for name in found if name.endswith(gate.text))) for gate in gates] == [
        "failure", "passed", "skipped",
    ], "the cost of an open loop is the load's own"  # fmt: skip
    assert found == {"comparable": "passed"}
    other = compare(side(tmp_path / "c", 1), side(tmp_path / "d", 1)[:0], gates)
    assert results(suite_of_comparison(other)) == {"comparable": "error"}


def test_a_condition_on_both_sides_of_its_bound_is_no_pass(tmp_path: Path) -> None:
    found = compare(side(tmp_path / "a", 1), side(tmp_path / "b", 2), [parse_gate("tpot_p50 > +1%")])
    open_ = [replace(load, gates=tuple(replace(g, outcome="undecided") for g in load.gates)) for load in found.loads]
    said = results(suite_of_comparison(replace(found, loads=tuple(open_))))
    assert [result for name, result in said.items() if name != "comparable"] == ["skipped"]


@given(st.text(), st.text(), st.sampled_from(["passed", "failure", "error", "skipped"]))
def test_any_text_makes_whole_xml(name: str, says: str, result: Any) -> None:
    root = ET.fromstring(render_junit([Suite(name=name, cases=[Case(name=name, result=result, says=says)])]))
    assert root.attrib["tests"] == "1" and root.attrib["failures"] == str(int(result == "failure"))
    (case,) = root.iter("testcase")
    assert [child.tag for child in case] == ["system-out" if result == "passed" else result]


def test_report_writes_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [good(i) for i in range(60)], spec=replace(SPEC, slo={"ttft": 0.001}))
    xml = tmp_path / "new" / "report.xml"
    assert cli.main(["report", str(run), "--junit", str(xml)], standalone_mode=False) == 4
    assert ET.parse(xml).getroot().attrib["failures"] == "1"


# ----------------------------------------------------------------------------------------------------------- the action


def action() -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (the dev extra has it)")
    return yaml.safe_load((ROOT / "action.yml").read_text())


def test_the_action_is_one_by_githubs_schema() -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="the audit extra has it")
    assert hashlib.sha256(SCHEMA.read_bytes()).hexdigest() == SCHEMA_SHA256
    validator = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))
    found = action()
    assert [error.message for error in validator.iter_errors(found)] == []
    assert not validator.is_valid({**found, "runs": {"using": "composite"}}), "the schema is one"


def test_inputs_reach_the_shell_as_variables_alone() -> None:
    """An expression in a script is text that the shell runs, whatever a pull request put there."""
    found = action()
    script = (ROOT / ".github/action/test.sh").read_text()
    used = set(re.findall(r"INPUT_\w+", script))
    for step in found["runs"]["steps"]:
        assert "${{" not in step["run"]
        used |= set(re.findall(r"INPUT_\w+", step["run"]))
    given = {name: value for step in found["runs"]["steps"] for name, value in step["env"].items()}
    assert given == {f"INPUT_{name.upper().replace('-', '_')}": f"${{{{ inputs.{name} }}}}" for name in found["inputs"]}
    assert used == given.keys()
    assert "eval" not in script


SIMULATED = """#!/bin/sh
# `harness replay` in virtual time on hardware that is not there: the same verdicts on any machine, however busy.
if [ "$1" = replay ]; then
  shift
  trace=$1
  [ "$2" = --base-url ] || exit 9
  shift 3
  set -- simulate "$trace" "$@" --tier "$SIMULATED_TIER"
fi
exec PYTHON -m harness "$@"
"""


class Job:
    """One run of the action's script, as GitHub would start it."""

    def __init__(self, folder: Path, tier: str = "") -> None:
        self.folder, self.tier, tool = folder, tier, folder / "bin" / "harness"
        tool.parent.mkdir(parents=True, exist_ok=True)
        script = SIMULATED if tier else '#!/bin/sh\nexec PYTHON -m harness "$@"\n'
        tool.write_text(script.replace("PYTHON", sys.executable))
        tool.chmod(0o755)

    def run(self, **inputs: str) -> tuple[int, dict[str, str], str, str]:
        """(exit status, outputs, step summary, log)"""
        files = {name: self.folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        asked = {name: str(spec.get("default", "")) for name, spec in action()["inputs"].items()} | {
            name.replace("_", "-"): value for name, value in inputs.items()
        }
        environment = {
            **os.environ, **{name: str(file) for name, file in files.items()}, "PYTHONPATH": str(ROOT),
            "SIMULATED_TIER": self.tier, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            **{f"INPUT_{name.upper().replace('-', '_')}": value for name, value in asked.items()},
        }  # fmt: skip
        done = subprocess.run(
            ["bash", ROOT / ".github/action/test.sh"], cwd=self.folder, env=environment, capture_output=True, text=True,
            timeout=280, check=False,
        )  # fmt: skip
        outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
        return done.returncode, outputs, files["GITHUB_STEP_SUMMARY"].read_text(), done.stdout + done.stderr


def test_a_first_job_leaves_the_baseline_that_a_slower_server_fails_against(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(
        "".join(f'{{"arrival_s": {k / 4}, "input_tokens": 90, "output_tokens": 30}}\n' for k in range(60))
    )
    asked = {"trace": "trace.jsonl", "model": "mistral-7b-instruct-v0.3", "slo": "e2e=60s", "baseline": "before",
             "base_url": "http://127.0.0.1:1/v1", "options": "--min-requests=30\n\n  --concurrency=6\n",
             "fail_if": "\ntpot_p50 > +20%\ntpot_p50 > +90000%"}  # fmt: skip
    status, outputs, summary, log = Job(tmp_path, "aws-p5.48xlarge").run(**asked, runs="before")
    assert status == 0, log
    assert outputs == {"runs": "before", "junit": "before/junit", "status": "0"}
    assert "::warning::no baseline at before yet" in log
    assert summary.count("<details>") == 3 and "VALID" in summary
    assert len(list((tmp_path / "before/junit").glob("replay-*.xml"))) == 3

    status, outputs, summary, log = Job(tmp_path, "aws-g6e.xlarge").run(**asked, runs="after")
    assert (status, outputs["status"]) == (4, "4"), log
    assert summary.index("Against the baseline") < summary.index("FAILS") < summary.index("<details>")
    root = ET.parse(tmp_path / "after/junit/compare.xml").getroot()
    assert (root.attrib["tests"], root.attrib["failures"], root.attrib["errors"]) == ("3", "1", "0")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"repeats": "3; touch hacked"}, "not a number"),
        ({"fail_if": "cost > +5%"}, "compares with a baseline"),
        ({"runs": "."}, "not empty"),
        ({"trace": "$(touch hacked)"}, "harness replay failed"),
        ({"options": "--limit=1\n`touch hacked`; touch hacked"}, "harness replay failed"),
    ],
)
def test_inputs_that_make_no_sense_are_said_and_never_run(inputs: dict[str, str], words: str, tmp_path: Path) -> None:
    asked = {"trace": "none.jsonl", "base_url": "http://127.0.0.1:1/v1", "repeats": "1"} | inputs
    status, _, _, log = Job(tmp_path).run(**asked)
    assert status in (1, 2) and words in log, log
    assert not (tmp_path / "hacked").exists()
