"""Can a smaller model do? harness audit lint: are the checks any good, before anything is rented."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from harness.cli.output import print_json, print_table, say
from harness.cli.verb import JSON_OPTION, TRACE_ARGUMENT, Group, takes
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_VALID, UsageError
from harness.options import ReadOptions

if TYPE_CHECKING:
    from harness.checks.lint import Lint, LintRecord
    from harness.trace.io import Files, Trace

COLUMNS = ("what", "records", "own answer", "another's", "garbage", "constant", "not gradable", "faults")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def audit() -> None:
    """Can a smaller, quantised or distilled model do the same work, and what does an accepted answer cost then?"""


@audit.command(
    short_help="Say whether the checks of a trace are any good.",
    epilog="""\b
Examples:
  harness audit lint trace.jsonl
  harness audit lint trace.jsonl --check '{"type": "contains"}'
Exit status: 0 sound, 3 a check is not, 5 no record has one.
""",
)
@TRACE_ARGUMENT
@takes(ReadOptions)
@click.option("--check", "default", metavar="JSON", help="Check of records that have none; its truth is 'expected'.")
@click.option("--run-code", is_flag=True, help="Run the code of recorded answers, in a sandbox or not at all.")
@JSON_OPTION
def lint(trace: Files, default: str | None, run_code: bool, format_: str, asked: ReadOptions) -> int:
    """Say whether the checks of a trace are any good: each accepts the recorded answer, rejects another record's and
    garbage, and no constant answer passes a kind of check or a tag. No model is asked: judges are not tried, nor is
    code without --run-code.
    """
    from harness.checks.grade import Grader
    from harness.checks.lint import lint as held
    from harness.checks.sandbox import LinuxSandbox, refusal
    from harness.checks.spec import parse_check
    from harness.trace.io import open_asked

    if default is not None:
        parse_check(default, ["a"])
    if run_code and (why := refusal()) is not None:
        raise UsageError(f"--run-code: this machine cannot make the sandbox ({why})")
    source = open_asked(trace, asked)
    found = held(_graded(source), Grader(sandbox=LinuxSandbox() if run_code else None), default)
    if format_ == "json":
        print_json({**dataclasses.asdict(found), "sound": found.sound})
    else:
        _print(found)
    if not found.checked and not found.unusable:
        say("no record has a check: give the records 'check' or 'expected' with --check")
        return EXIT_NOT_DECIDED
    return EXIT_VALID if found.sound else EXIT_INVALID


def _graded(source: Trace) -> Iterator[LintRecord]:
    from harness.checks.lint import LintRecord

    for record in source:
        said = record.text if record.messages is None else "\n".join(one["content"] for one in record.messages)
        yield LintRecord(
            line=record.line, check=record.check, gate=record.gate, expected=record.expected, answer=record.answer,
            prompt=said or "", tags=record.tags or (),
        )  # fmt: skip


def _print(found: Lint) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    rows: list[tuple[str, ...]] = [
        (
            group.name, f"{group.records:,}", share(group.own), share(group.others), f"{group.garbage:,}",
            share(group.constant), share(group.ungraded), ", ".join(group.faults) or "-",
        )
        for group in found.groups
    ]  # fmt: skip
    if rows:
        print_table(COLUMNS, rows)
    for line, why in found.problems:
        print(f"line {line}: {why}")
    if found.unusable > len(found.problems):
        print(f"and {found.unusable - len(found.problems):,} more that cannot be used")
    state = "sound" if found.sound else "not sound"
    say(f"{found.checked:,} of {found.records:,} records have a check that can be used; {state}")
