"""Models of a trace: listed with rows and tokens, chosen, said where a plan mixes them. What inspect surveys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from harness.cli.trace import trace as verbs
from harness.errors import TraceError, UsageError
from harness.plan.spec import PlanSpec
from harness.trace.formats.record import TraceRecord
from harness.trace.io import open_trace
from harness.trace.sources import parse_where
from harness.trace.survey import survey

ROWS = [("llama-3-8b", 10, 1), ("llama-3-70b", 20, 2), ("gpt-4o", 300, 30), ("llama-3-8b", 40, 4), (None, 5, 5)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"timestamp": 1_790_000_000 + at, "prompt_tokens": i, "completion_tokens": o, "session_id": f"s{at}"}
        | ({"model": model} if model else {})
        for at, (model, i, o) in enumerate(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(verbs, [str(a) for a in args])


@pytest.mark.parametrize(
    ("where", "tokens"),
    [
        (("model=llama-3*",), [10, 20, 40]),
        (("model=gpt-4o",), [300]),
        (("model=gpt-4o|llama-3-70b",), [20, 300]),
        (("model=llama*", "session=s[03]"), [10, 40]),
        (("model=*",), [10, 20, 300, 40]),
    ],
)
def test_rows_are_chosen_by_model_and_session(mixed, where, tokens):
    trace = open_trace(mixed, where=parse_where(where))
    assert [r.input_tokens for r in trace] == tokens
    assert trace.rows_read == 5 == trace.rows_kept + sum(trace.rows_dropped.values())


def test_what_is_not_chosen_is_counted(mixed):
    trace = open_trace(mixed, where=parse_where(["model=llama-3-8b"]))
    list(trace)
    assert trace.rows_dropped == {"not model=llama-3-8b (--where)": 3}
    with pytest.raises(TraceError, match=r"no usable row: 5 rows read, dropped: 5 not model=mistral"):
        list(open_trace(mixed, where=parse_where(["model=mistral*"])))


@pytest.mark.parametrize("text", ["", "model", "model=", "llama=3", "model=a||b"])
def test_a_choice_that_is_none(text):
    with pytest.raises(UsageError):
        parse_where([text])


def test_case_counts_and_what_is_not_said_does_not_match():
    (wanted,) = parse_where(["model=Llama*"])
    assert wanted.unmatched(TraceRecord(0, 1, 1, model="Llama-3")) is None
    assert wanted.unmatched(TraceRecord(0, 1, 1, model="llama-3")) is not None
    assert wanted.unmatched(TraceRecord(0, 1, 1)) is not None


def test_inspect_lists_models_with_rows_and_tokens(mixed):
    facts = json.loads(run("inspect", mixed, "--format", "json").stdout)
    assert facts["models"] == [
        {"model": "llama-3-8b", "rows": 2, "input_tokens": 50, "output_tokens": 5},
        {"model": None, "rows": 1, "input_tokens": 5, "output_tokens": 5},
        {"model": "gpt-4o", "rows": 1, "input_tokens": 300, "output_tokens": 30},
        {"model": "llama-3-70b", "rows": 1, "input_tokens": 20, "output_tokens": 2},
    ]
    text = run("inspect", mixed).stdout
    assert "llama-3-8b: 2 rows, 50 input and 5 output tokens" in text
    assert "models  " not in run("inspect", mixed, "--where", "session=s4").stdout


def test_a_converted_trace_keeps_its_models(mixed, tmp_path):
    for name in ("out.jsonl", "out.parquet"):
        assert run("convert", mixed, "-o", tmp_path / name, "--where", "model=*").exit_code == 0
        assert [r.model for r in open_trace(tmp_path / name)] == [model for model, _, _ in ROWS if model]


def plan_notes(path: Path, *where: str) -> list[str]:
    from harness.plan.build import build_plan
    from harness.plan.prompts import Vocabulary

    trace = open_trace(path, where=parse_where(where))
    out = path.with_name(f"{len(where)}.arrow")
    return build_plan(trace, out, PlanSpec(closed=False), Vocabulary.from_ids(range(1000, 3000))).notes


def test_a_plan_that_mixes_models_says_so(mixed):
    (note,) = [note for note in plan_notes(mixed) if "mixes" in note]
    assert "the traffic of 4 models: llama-3-8b 40%, (not said) 20%, gpt-4o 20%, llama-3-70b 20%" in note
    assert "--where model=NAME" in note
    assert not any("mixes" in note for note in plan_notes(mixed, "model=gpt*"))
    assert survey(open_trace(mixed), made_up=True).models[0].rows == 2


# --- inspect surveys, plan refuses -----------------------------------------------------------------------------------


def test_inspect_surveys_all_rows_and_lists_why_some_cannot_be_read(tmp_path):
    path = tmp_path / "t.jsonl"
    good = [json.dumps({"prompt": "a", "output_tokens": 1})] * 5
    path.write_text("\n".join([*good, '{"promt": "b"}', *good, '{"prompt": 5}', "{", "{", ""]))
    with pytest.raises(TraceError, match=r":6:"):
        list(open_trace(path))
    done = run("inspect", path)
    assert done.exit_code == 0
    assert "14 read, 10 kept; 1 bad fields; 2 not JSON; 1 unknown field" in done.stdout
    assert "4 rows cannot be read, and a plan refuses them" in done.stdout
    for line, why in ((6, "unknown field 'promt'"), (12, "Expected"), (13, "not a JSON object")):
        assert f"{path}:{line}: {why}" in done.stdout
    facts = json.loads(run("inspect", path, "--format", "json").stdout)
    assert facts["examples"].keys() == {"bad fields", "not JSON", "unknown field"}
    assert run("convert", path, "-o", tmp_path / "out.jsonl").exit_code != 0


def test_a_trace_without_a_usable_row_says_the_first_reason(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": 5}\n{"prompt": 6}\n')
    done = run("inspect", path)
    assert done.exit_code != 0
    assert f"no usable row: 2 rows read, dropped: 2 bad fields; the first: {path}:1: Expected" in str(done.exception)
