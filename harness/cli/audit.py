"""Can a smaller model do? harness audit lint: are the checks any good, before anything is rented."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.audit.asked import AuditOptions
from harness.cli.output import print_json, print_table, say
from harness.cli.verb import (
    ENVIRONMENT,
    JSON_OPTION,
    ONE_TRACE_ARGUMENT,
    TRACE_ARGUMENT,
    Group,
    html_option,
    out_option,
    resume_option,
    takes,
)
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_VALID, UsageError
from harness.option_types import EXISTING, FILE, options_of
from harness.options import (
    AttainOption,
    LoadOptions,
    PlanOptions,
    ReadOptions,
    ReplayOptions,
    ReportOptions,
    SearchOptions,
    ServeOptions,
)

if TYPE_CHECKING:
    from harness.checks.lint import Lint, LintRecord
    from harness.trace.io import Files, Trace

COLUMNS = ("what", "records", "own answer", "another's", "garbage", "constant", "not gradable", "faults")


class _TraceOrVerb(Group):
    """``harness audit TRACE ...`` is ``harness audit run TRACE ...``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``run`` before what is not a verb."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--help-all"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_TraceOrVerb, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def audit() -> None:
    """Can a smaller, quantised or distilled model do the same work, and what does an accepted answer cost then?

    harness audit TRACE --current MODEL@WHERE --candidate MODEL@WHERE --slo ... is short for harness audit run (harness
    audit run --help has its options). Try the checks of TRACE with lint first; harness/checks/CHECKS.md describes them.
    """


ASKED = ("limit", "rate", "seed", "tokenizer", "endpoint")
SENT = ("output_lengths", "length_field", "min_requests", "workers", "timeout_s", "stall_s", "extra_body", "keep_text",
        "no_counters", "retries", "headers", "header_env", "key_header", "tls_ca")  # fmt: skip

ENGINE = (
    "Servers to start: vLLM (default), or simulated: what each MODEL@TIER carries and costs, on hardware that need not "
    "be there, with the answer lengths of TRACE. Nobody is asked, so no quality is measured."
)


@audit.command(
    short_help="Compare candidates with the current model: quality, load, money, verdict.",
    epilog=f"""\b
Examples:
  harness audit trace.jsonl --current big@https://api.example.com/v1 --list-price big=2.5:10 \\
    --candidate small@aws-m7a.large --slo ttft_p95=2s,tpot_p95=200ms --margin 2pt
  harness audit trace.jsonl ... --dry-run
  harness audit trace.jsonl ... --resume
  harness audit trace.jsonl ... --repeats 3 --tries 2 --escalate --extra-body '{{"temperature": 0.7}}'
  harness audit trace.jsonl ... --cascade
  harness audit lengths.jsonl --engine simulated --current llama-3.1-70b-instruct@lambda-h100x2 \\
    --candidate mistral-7b-instruct-v0.3-fp8@lambda-h100 --slo ttft_p95=2s,tpot_p95=100ms
  harness audit trace.jsonl ... --judge https://judge.example.com/v1 --judge-model NAME --labelled labels.jsonl

\b
A hosted API, which refuses fields that only vLLM knows, needs --length-field max_completion_tokens; models on a
tier are not concerned.

\b
Exit status:
  0  decided, for one candidate at least
  1  something failed; the message says what
  2  the command line is wrong
  3  INVALID: what was measured proves nothing
  4  the current model misses the SLO, or --fail-if fired
  5  nothing is decided: the page says how many records are missing
  130  stopped by Ctrl-C; --resume goes on

{ENVIRONMENT.rstrip()}
  HARNESS_JUDGE_API_KEY  the key of --judge""",
)
@ONE_TRACE_ARGUMENT
@takes(AuditOptions, to="want")
@takes(
    ReplayOptions,
    options_of(ReadOptions, "trace_format", "skip_bad", "sort", "where"),
    options_of(PlanOptions, *ASKED),
    options_of(ServeOptions, engine={"help": ENGINE}),
    options_of(LoadOptions, *SENT, slo={"help": "The SLO: ttft_p95=2s,tpot_p95=200ms.", "required": True}),
    options_of(AttainOption),
    options_of(ReportOptions, "format_"),
)
@takes(SearchOptions, to="search")
@resume_option("Go on with the audit in FOLDER (default: the newest of TRACE): say the rest of the command again.")
@out_option("audits", "folders of audits")
@html_option("the audit")
def run(
    trace: Path, out: Path, resume: str | None, html: Path | None, asked: ReplayOptions, want: AuditOptions,
    search: SearchOptions,
) -> int:  # fmt: skip
    """Send the records of TRACE that have a check to every model, grade the answers, load each model with its own
    answer lengths, and say for each candidate whether it may replace the current model.

    A candidate is switched to when it is not worse by --margin or more, in all and in every slice that matters, when
    the whole bill is smaller, and when it keeps the SLO. The current model is asked twice: the noise floor.
    """
    if asked.serve.engine == "simulated":
        from harness.cli.runner.audit_simulated import simulated_audit

        return simulated_audit(trace, out, resume, html, asked, want, search)
    from harness.cli.runner.audit_run import audited

    return audited(trace, out, resume, html, asked, want, search)


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
    from harness.checks.spec import decode_check
    from harness.trace.io import open_asked

    if default is not None:
        decode_check(default)
    if run_code and (why := refusal()) is not None:
        raise UsageError(f"--run-code: this machine cannot make the sandbox ({why})")
    source = open_asked(trace, asked)
    found = held(_graded(source), Grader(sandbox=LinuxSandbox() if run_code else None), default)
    if format_ == "json":
        print_json({"schema": "harness.lint/1", **dataclasses.asdict(found), "sound": found.sound})
    else:
        _print(found)
    if not found.checked and not found.unusable:
        say("no record has a check: give the records 'check' or 'expected' with --check")
        return EXIT_NOT_DECIDED
    return EXIT_VALID if found.sound else EXIT_INVALID


@audit.command(
    short_help="Hold the kept answers of an audit against other checks.",
    epilog="""\b
Examples:
  harness audit grade audits/20261201-090000-audit-trace --check new.toml
\b
A new.toml, where the first check whose tags a record has is that record's; others keep their own:
  [[check]]
  when = { task = "sums" }
  type = "number"
  abs = 0.5
Exit status: 0 graded, 2 the audit kept no text.
""",
)
@click.argument("folder", metavar="RUN", type=EXISTING)
@click.option("--check", "checks", metavar="FILE", type=FILE, required=True, help="TOML with [[check]] tables.")
@JSON_OPTION
def grade(folder: Path, checks: Path, format_: str) -> int:
    """Hold the answers that the audit in RUN kept (--keep-text) against other checks. What is chosen after the results
    decides nothing: it says what the checks change, beside what was found before. Judges and code are not gradable.
    """
    from harness.cli.runner.audit_grade import regraded

    return regraded(folder, checks, format_)


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
