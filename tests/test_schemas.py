"""Machine-readable documents: installed schemas are those of the types, hold for real output, and keep what an earlier
version promised.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from tests import schemas
from tests.conftest import ROOT, harness
from tests.golden.cases import unpacked
from tests.schemas import DOCUMENTS, PROMISED, SCHEMAS, broken, check, promises

PACKAGES = ("harness", "scenarios", "cluster", "analysis")


@pytest.fixture(scope="module")
def made() -> dict[str, schemas.Schema]:
    return schemas.made()


def test_files_are_those_of_the_types(made: dict[str, schemas.Schema]) -> None:
    written = {path.name: path.read_text() for path in SCHEMAS.glob("*.json")}
    assert written.keys() == made.keys(), "python -m tests.schemas"
    assert [name for name in made if written[name] != schemas.text(made[name])] == [], "python -m tests.schemas"


def test_no_version_breaks_what_it_promised(made: dict[str, schemas.Schema]) -> None:
    promised = json.loads(PROMISED.read_text())
    assert made.keys() <= promised.keys(), "python -m tests.schemas"
    for name, schema in made.items():
        assert broken(promised[name], promises(schema)) == [], f"{name}: give it a new version"


def test_a_field_that_goes_or_changes_is_seen_and_a_new_one_is_welcome(made: dict[str, schemas.Schema]) -> None:
    before = made["report-1.json"]
    promised = promises(before)
    after = copy.deepcopy(before)
    after["properties"]["new"] = {"type": "string"}
    assert broken(promised, promises(after)) == []
    del after["properties"]["verdict"]
    after["$defs"]["Quantity"]["properties"]["unit"] = {"type": "integer"}
    said = broken(promised, promises(after))
    assert "$.verdict is gone" in said
    assert "$.metrics.ttft.mean.unit was string, is integer" in said


@pytest.mark.parametrize("asked", [
    "tiers", "models", "doctor", "ps", "cluster status", "trace inspect scenarios/traces/example.jsonl",
    "sweep scenarios/sweep.example.toml --dry-run",
    "audit lint scenarios/traces/example.jsonl",
    "advise scenarios/traces/azure-conv-2023.csv --model mistral-7b-instruct-v0.3 --slo ttft=2s --tier aws-g6.xlarge",
    "plan scenarios/traces/example.jsonl --model smollm2-135m -o {folder}/plan.arrow",
])  # fmt: skip
def test_printed_documents_are_valid(asked: str, tmp_path: Path) -> None:
    done = harness(*asked.format(folder=tmp_path).split(), "--format", "json", cwd=ROOT)
    check(json.loads(done.stdout))


def test_manifests_of_old_runs_are_valid(tmp_path: Path) -> None:
    with unpacked(tmp_path):
        files = [*tmp_path.rglob("run.json")]
        assert len(files) > 5
        for file in files:
            check({"schema": "harness.run/1", **json.loads(file.read_text())}, closed=False)


def test_every_name_in_the_code_has_its_schema() -> None:
    code = "".join(path.read_text() for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
    named = set(re.findall(r"\"(harness\.[a-z-]+/\d+)\"", code)) - {"harness.listprices/1"}  # a file that is read alone
    assert named - {one.schema for one in DOCUMENTS} == set()
    lists = re.findall(r"print_json\(\[.*", code)
    assert lists == ["print_json([dict(zip(names, row, strict=True)) for row in rows])"], (
        "harness sql: what was asked for"
    )


def test_every_document_is_in_the_site() -> None:
    page = (ROOT / "docs" / "schemas.md").read_text()
    assert [one.schema for one in DOCUMENTS if f"`{one.schema}`" not in page] == []
