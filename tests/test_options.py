"""Options of the command line as typed objects: one set of defaults, and all rules checked before anything is done."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import click
import pytest

from harness.cli import capacity, cli, replay
from harness.cli.sweep import resolve
from harness.cli.verb import Verb
from harness.errors import UsageError
from harness.option_types import made, options_of
from harness.options import LoadOptions, PlanOptions, ReplayOptions, ReportOptions, ServeOptions

ROOT = Path(__file__).resolve().parent.parent
GROUPS = (PlanOptions, ServeOptions, LoadOptions, ReportOptions)


def params_of(verb: click.Command, *argv: str) -> dict[str, object]:
    return verb.make_context(verb.name, [*argv]).params


def test_what_is_not_given_is_the_same_on_the_command_line_and_from_python() -> None:
    params = params_of(replay.replay, "trace")
    assert made(ReplayOptions, params) == ReplayOptions()
    assert resolve({}, "f", Path()) == ReplayOptions()


def test_every_option_of_replay_has_its_place_in_one_group_and_no_other() -> None:
    names = [f.name for group in GROUPS for f in fields(group) if f.metadata]
    assert len(names) == len(set(names))
    assert set(names) == params_of(replay.replay, "trace").keys() - {"trace", "out"}


VERBS = (replay.replay, replay.plan, replay.run, capacity.capacity)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: str(verb.name))
def test_no_verb_has_an_option_that_gets_lost(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a replay reach a verb's body as one object; those that it has of its own are its parameters."""
    groups = {option.name for option in options_of(ReplayOptions)}
    own = {p.name for p in verb.params} - groups
    body = verb.callback.__wrapped__  # type: ignore[union-attr]
    while hasattr(body, "__wrapped__"):
        body = body.__wrapped__
    taken = set(inspect.signature(body).parameters) - {"asked", "search"}
    assert own - {"max_usd", "max_hours", "probe_s", "tolerance", "busiest"} == taken - groups


RULES = {
    "--concurrency 4 --rate 2": "drop it or --rate",
    "--concurrency 4 --arrivals poisson": "drop it or --arrivals",
    "--concurrency 4 --stages 1m@2": "drop it or --stages",
    "--concurrency 4 --max-concurrency 8": "drop it or --max-concurrency",
    "--speed 2 --rate 2": "both rescale",
    "--ramp 5s": "add --concurrency",
    "--no-stream --slo ttft=1s": "no ttft",
    "--length-field a-b --base-url http://127.0.0.1:1": "not the name of a field",
    "--metrics-url http://127.0.0.1:1/m": "--base-url",
    "--base-url http://127.0.0.1:1 --metrics-url http://127.0.0.1:1/m --no-counters": "give one",
    "--live --clock virtual --engine simulated": "as time passes",
    "--key-header api-key": "ours take a bearer",
    '--extra-body {"stream":true}': "--no-stream",
}


@pytest.mark.parametrize("words", RULES)
def test_what_excludes_each_other_is_refused_before_anything_is_read(words: str, tmp_path: Path) -> None:
    """No trace is there, no server answers and no model is known: the rule is heard first."""
    argv = ["replay", str(tmp_path / "none.jsonl"), "--model", "none", "-o", str(tmp_path / "runs"), *words.split()]
    with pytest.raises(UsageError, match=RULES[words]):
        cli.main(argv, standalone_mode=False)
    assert not (tmp_path / "runs").exists()


def test_a_plan_and_a_run_of_a_closed_loop() -> None:
    closed = LoadOptions(concurrency=2)
    with pytest.raises(UsageError, match="no planned times"):
        ReplayOptions(plan=PlanOptions(warmup=30.0), load=closed).check_plan()
    ReplayOptions(plan=PlanOptions(warmup=30), load=closed).check_plan()
    ReplayOptions(plan=PlanOptions(warmup=30.0), load=closed).check_run(Path("p"), planned_closed=True)
    for options, is_closed, words in (
        (ReplayOptions(), True, "say --concurrency"),
        (ReplayOptions(plan=PlanOptions(warmup=30), load=closed), True, "part of the plan"),
        (ReplayOptions(plan=PlanOptions(warmup=30.0)), False, "part of the plan"),
    ):
        with pytest.raises(UsageError, match=words):
            options.check_run(Path("p"), planned_closed=is_closed)


def untyped(path: Path) -> list[str]:
    """Functions of a module with a dictionary of anything among what they take or give."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            every = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
            said = [ast.unparse(a.annotation) for a in every if a.annotation] + [ast.unparse(node.returns or node)]
            if any("dict[str, Any]" in s or "Mapping[str, Any]" in s for s in said[:-1] + said[-1:] if len(s) < 400):
                found.append(f"{path.name}:{node.lineno} {node.name}")
    return found


def test_no_dictionary_of_anything_goes_from_function_to_function() -> None:
    files = [*(ROOT / "harness/cli").rglob("*.py"),
             *(ROOT / "harness/sweep").glob("*.py")]  # fmt: skip
    assert [one for file in files for one in untyped(file)] == []
