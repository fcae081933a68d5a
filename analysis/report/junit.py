"""Verdicts as JUnit XML, which CI systems show: a test suite for each run or comparison, a test case for each gate.

A case fails where an SLO is missed or a condition of ``--fail-if`` fails, is an error where the run is INVALID, and is
skipped where nothing was decided: too few requests or runs are no pass. Source: the schema of Jenkins' xUnit plugin,
https://github.com/jenkinsci/xunit-plugin, of which this is the part that all readers share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from harness.analysis.compare.compare import Comparison, Gate
from harness.analysis.labels import clean
from harness.analysis.summary import Summary
from harness.errors import ResultsError
from harness.slo import percent

Result = Literal["passed", "failure", "error", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question and its answer."""

    name: str
    result: Result
    says: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The questions about one run, or one comparison."""

    name: str
    cases: Sequence[Case]


def suite_of_run(summary: Summary) -> Suite:
    """Is it VALID, and was each criterion of the SLO kept?"""
    valid = summary.verdict == "VALID"
    result: Result = "passed" if valid else "error" if summary.verdict == "INVALID" else "skipped"
    cases = [Case(name="verdict", result=result, says=f"{summary.verdict}: {'; '.join(summary.reasons)}")]
    for one in summary.slo.criteria if summary.slo is not None else ():
        share = one.attainment.value
        kept = f"{'not known' if share is None else percent(share)} of requests; {percent(one.wanted)} was wanted"
        if not valid:
            kept = f"{summary.verdict}: not judged"
        judged: Result = "skipped" if one.met is None or not valid else "passed" if one.met else "failure"
        cases.append(Case(name=f"SLO: {one.name}", result=judged, says=kept))
    return Suite(name=summary.run, cases=cases)


def suite_of_comparison(found: Comparison) -> Suite:
    """Can the two be compared, and does each condition hold at each load?"""
    comparable = Case(
        name="comparable", result="passed" if found.comparable else "error", says="; ".join(found.reasons)
    )
    cases = [
        Case(name=f"{load.load}: {gate.text}", result=_OUTCOMES[gate.outcome], says=_says(gate, load.verdict))
        for load in found.loads
        for gate in load.gates
    ]
    return Suite(name="compare", cases=[comparable, *cases])


_OUTCOMES: dict[str, Result] = {
    "fails": "failure", "holds": "passed", "undecided": "skipped", "not judged": "skipped",
}  # fmt: skip


def _says(gate: Gate, verdict: Sequence[str]) -> str:
    undecided = "undecided: the interval lies on both sides of the bound; more repeats would decide"
    return " ".join(filter(None, [gate.why or (undecided if gate.outcome == "undecided" else gate.outcome), *verdict]))


def render_junit(suites: Iterable[Suite]) -> bytes:
    """The document."""
    suites = list(suites)
    root = ET.Element("testsuites", {"name": "harness", **_counts([case for suite in suites for case in suite.cases])})
    for suite in suites:
        name = clean(suite.name)
        inside = ET.SubElement(root, "testsuite", {"name": name, **_counts(suite.cases)})
        for case in suite.cases:
            entry = ET.SubElement(inside, "testcase", name=clean(case.name), classname=f"harness.{name}", time="0")
            if case.result == "passed":
                ET.SubElement(entry, "system-out").text = clean(case.says)
            else:
                ET.SubElement(entry, case.result, message=clean(case.says))
    ET.indent(root)
    made: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return made + b"\n"


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    results = [case.result for case in cases]
    return {
        "tests": str(len(cases)), "failures": str(results.count("failure")), "errors": str(results.count("error")),
        "skipped": str(results.count("skipped")), "time": "0",
    }  # fmt: skip


def write_junit(path: Path, suites: Iterable[Suite]) -> None:
    """Write it; an earlier one is replaced. Raises `ResultsError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(render_junit(suites))
    except OSError as e:
        raise ResultsError(f"{path}: cannot write ({e.strerror}); choose another --junit") from e
