from __future__ import annotations

from pathlib import Path

import pytest
from run_files import write_run

from harness.errors import ResultsError
from harness.record.host import describe_host, installed_versions
from harness.record.manifest import RunDir, create_run_dir, read_manifest, write_manifest


def test_directories_are_never_overwritten(tmp_path: Path) -> None:
    made = [create_run_dir(tmp_path, "a trace / model").path for _ in range(3)]
    assert len(set(made)) == 3
    assert all(p.is_dir() and p.parent == tmp_path for p in made)
    assert create_run_dir(tmp_path / "deeper" / "still", "../..").path.parent == tmp_path / "deeper" / "still"


def test_no_place_for_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ResultsError, match="--out"):
        create_run_dir(file, "x")
    with pytest.raises(ResultsError, match="--out"):
        create_run_dir(file / "below", "x")


def test_manifest_round_trip(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [])
    manifest = read_manifest(path)
    manifest.status, manifest.reason = "failed", "because é < ü"
    write_manifest(RunDir(path), manifest)
    assert read_manifest(path) == manifest
    assert not list(path.glob(".run.json*")), "the temporary file is gone"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not a run directory"),
        ("", "run.json"),
        ("{", "run.json"),
        ("[]", "run.json"),
        ('{"schema_version": "99"}', "this harness reads 1"),
        ("{}", "this harness reads 1"),
        ('{"schema_version": "1"}', "missing required field"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ResultsError, match=words):
        read_manifest(tmp_path)


def test_result_files_are_listed_by_number(tmp_path: Path) -> None:
    for worker in (10, 2, 0):
        RunDir(tmp_path).results(worker).touch()
    assert [p.name for p in RunDir(tmp_path).all_results()] == [f"results-{k}.arrows" for k in (0, 2, 10)]


def test_facts_of_this_machine() -> None:
    host = describe_host()
    assert host.cores >= 1
    assert host.memory_gib > 0
    assert {"harness", "python", "pyarrow"} <= set(installed_versions())
