"""A run directory, a sweep or a list from strangers: one clear line, soon, and the others go on."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from run_files import good, write_run

from harness.analysis.rows.read import read_run
from harness.cli import cli
from harness.cluster.catalogue.tiers import read_tiers
from harness.errors import HarnessError, ResultsError, TraceError, UsageError
from harness.record.manifest import read_manifest
from harness.server import probe
from harness.sweep.spec import read_sweep
from harness.sweep.state import read_state
from harness.trace.io import open_trace
from harness.untrusted import TOML_BYTES, read_regular


def a_run(path: Path) -> Path:
    return write_run(path, [good(i) for i in range(10)])


def deep(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


def damage_manifest(path: Path, text: str) -> None:
    (path / "run.json").write_text(text)


def with_spec(path: Path, **fields: object) -> None:
    manifest = json.loads((path / "run.json").read_bytes())
    manifest["spec"].update(fields)
    damage_manifest(path, json.dumps(manifest))


def pipe(path: Path, name: str) -> None:
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)


def device(path: Path, name: str) -> None:
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with (path / "run.json").open("r+b") as file:
        file.truncate(3 << 30)


BAD = {
    "deep": lambda path: damage_manifest(path, '{"schema_version":"1","x":' + deep() + "}"),
    "deep field": lambda path: damage_manifest(path, json.dumps(json.loads((path / "run.json").read_bytes())).replace(
        '"extra_body": {}', '"extra_body": {"a": ' + deep() + "}")),
    "not UTF-8": lambda path: (path / "run.json").write_bytes(b'{"schema_version":"1","x":"\xff"}'),
    "pipe": lambda path: pipe(path, "run.json"),
    "device": lambda path: device(path, "run.json"),
    "3 GB": huge,
    "workers": lambda path: with_spec(path, workers=10**12),
    "no workers": lambda path: with_spec(path, workers=-1),
    "plan pipe": lambda path: pipe(path, "plan.arrow"),
    "plan device": lambda path: device(path, "plan.arrow"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_run_directory_of_strangers_is_one_line(tmp_path: Path, kind: str) -> None:
    path = a_run(tmp_path / "run")
    BAD[kind](path)
    with pytest.raises(HarnessError) as caught:
        read_run(path)
    said = str(caught.value)
    assert str(path) in said and len(said) < 400 + len(str(path)) and "\n" not in said


@pytest.mark.parametrize("make", [pipe, device])
def test_results_that_are_no_files_are_a_problem_of_the_run(tmp_path: Path, make) -> None:
    path = a_run(tmp_path / "run")
    make(path, "results-0.arrows")
    run = read_run(path)
    assert any("results-0.arrows" in problem for problem in run.problems)
    (path / "worker-0.arrows").unlink(missing_ok=True)
    pipe(path, "worker-0.arrows")
    read_run(path)


def test_a_folder_of_runs_survives_its_bad_ones(tmp_path: Path, monkeypatch) -> None:
    for kind, damage in BAD.items():
        damage(a_run(tmp_path / kind.replace(" ", "-")))
    a_run(tmp_path / "good")
    a_run(tmp_path / "buggy")
    real = read_run

    def reads(path: Path):
        if path.name == "buggy":
            raise KeyError("a fault of ours")
        return real(path)

    monkeypatch.setattr("harness.analysis.rows.read.read_run", reads)
    monkeypatch.setattr("webbrowser.open", lambda url: None)
    done = CliRunner().invoke(cli, ["open", str(tmp_path)], standalone_mode=False)
    assert done.exception is None and "m on test.large" in Path(done.stdout.strip()).read_text()
    for kind in (*BAD, "buggy"):
        assert kind.replace(" ", "-") in done.stderr
    assert "good" not in done.stderr


@pytest.mark.parametrize("text", ["a=" + deep(), "a=" + "9" * 10_000, "a=\n", "a" * (TOML_BYTES + 1)])
def test_toml_of_any_kind_is_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    for read in (lambda: read_tiers(file), lambda: read_sweep(file, (), {})):
        with pytest.raises(UsageError, match=r"x\.toml") as caught:
            read()
        assert str(caught.value).count("x.toml") == 1 and len(str(caught.value)) < 500
    file.unlink()
    os.mkfifo(file)
    for read in (lambda: read_tiers(file), lambda: read_sweep(file, (), {}), lambda: probe.trust(file)):
        with pytest.raises(UsageError, match="not a regular file"):
            read()


@pytest.mark.parametrize("name", ["lines", "array", "gzip", "later"])
def test_blanks_without_end_are_one_line_and_read_no_further(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr("harness.trace.source.MAX_LINE_BYTES", 1 << 16)
    row = b'{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}\n'
    text = {"lines": b" \n" * (1 << 16), "array": b"[" + b" " * (1 << 20), "later": row + b"\n" * (1 << 17)}
    file = tmp_path / "t"
    file.write_bytes(gzip.compress(b" " * (1 << 22)) if name == "gzip" else text[name])
    with pytest.raises(TraceError, match="nothing but blanks"):
        list(open_trace(file))


def test_a_few_blanks_are_no_matter(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    row = '{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}'
    file.write_text(f"\n\n[\n\n  {row},\n\n\n{row}\n\n]\n\n")
    assert len(list(open_trace(file))) == 2


def test_a_sweep_of_strangers_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"schema_version":' + deep() + "}")
    with pytest.raises(ResultsError, match="nested too deeply"):
        read_state(tmp_path)
    pipe(tmp_path, "sweep.json")
    with pytest.raises(ResultsError, match="not a regular file"):
        read_state(tmp_path)


def test_files_are_read_up_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    assert read_regular(tmp_path / "x", 3) == b"123"
    with pytest.raises(OSError, match="larger than"):
        read_regular(tmp_path / "x", 2)
    with pytest.raises(ResultsError, match="not a run directory"):
        read_manifest(tmp_path)
