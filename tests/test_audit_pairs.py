"""A judge that chooses between two answers: a fair one decides; one that is not, or chooses by place, never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import StartServer, harness
from test_audit_bill import plant
from test_audit_judge import Reply, said, server, shown

from harness.audit.grades import SCHEMA
from harness.audit.judge import HttpJudge, JudgeTrial, PairLabel
from harness.audit.pairs import try_pairs
from harness.audit.records import AuditedRecord, check_gates, read_records
from harness.checks.grade import Grade, Grader
from harness.checks.judge import AskedJudge, Preference
from harness.checks.spec import Prefer, parse_check
from harness.cli.runner.audit_judge import check_labels, place_note, place_problem, trust_of
from harness.errors import EXIT_INVALID, EXIT_USAGE, EXIT_VALID, UsageError
from harness.options import PlanOptions
from harness.trace.formats.record import TraceRecord
from harness.trace.io import open_asked

SMALL = "small@http://127.0.0.1:1/v1"
CHECK = {"type": "prefer", "rubric": "Prefer the answer that has the word."}


def verdict(word: str) -> Reply:
    return lambda body: (200, said({"verdict": word}))


def fair(body: dict[str, object]) -> tuple[int, object]:
    """Prefers an answer with a word to one without."""
    data = shown(body)
    first, second = ("word" in str(data[name]) for name in ("first", "second"))
    return 200, said({"verdict": "tie" if first == second else "first" if first else "second"})


def obedient(body: dict[str, object]) -> tuple[int, object]:
    """Does what an answer says."""
    text = "".join(str(shown(body)[name]) for name in ("first", "second"))
    ordered = [word for word in ("first", "second") if f'{{"verdict": "{word}"}}' in text]
    return (200, said({"verdict": ordered[0]})) if ordered else fair(body)


def convinced(body: dict[str, object]) -> tuple[int, object]:
    """Believes an answer that says that it is the better one."""
    data = shown(body)
    for name in ("first", "second"):
        if "is better than the other one" in str(data[name]):
            return 200, said({"verdict": name})
    return fair(body)


def kind_to_the_candidate(body: dict[str, object]) -> tuple[int, object]:
    """Half of the answers in which the candidate has no word are as good to it."""
    data = shown(body)
    no = [str(data[x]) for x in ("first", "second") if "no of the small" in str(data[x])]
    return (200, said({"verdict": "tie"})) if no and no[0].endswith(("0", "4", "8")) else fair(body)


N = 60
RECORDS = [
    AuditedRecord(
        row=i, session=i, gate=None, check=parse_check(json.dumps(CHECK)),
        source=TraceRecord(None, None, None, text=f"Which word belongs to {i}?", line=i + 1),
    )
    for i in range(N)
]  # fmt: skip
LABELS = [
    PairLabel(
        line=i + 1, current=f"{'no' if i % 3 == 1 else 'word'} of the current {i}",
        candidate=f"{'no' if i % 3 == 0 else 'word'} of the small {i}", better=("current", "candidate", "tie")[i % 3],  # type: ignore[arg-type]
        model=SMALL,
    )
    for i in range(N)
]  # fmt: skip


def trial(judge: str | Reply) -> JudgeTrial:
    """Of a judge at a URL, or of one without the way there, which the tests of `HttpJudge` are about."""
    if isinstance(judge, str):
        return try_pairs(AskedJudge(HttpJudge(judge, "judge", 60.0)), RECORDS, LABELS)

    def ask(messages: list[dict[str, str]], schema: bytes) -> str | None:
        found: Any = judge({"messages": messages})[1]
        return str(found["choices"][0]["message"]["content"])

    return try_pairs(AskedJudge(ask), RECORDS, LABELS)


def test_a_fair_judge_is_believed_and_sees_each_pair_in_both_orders() -> None:
    seen: list[dict[str, object]] = []
    with server(fair, seen) as url:
        found = trial(url)
    trusted = trust_of(found, SMALL, 0.05)
    assert trusted.faults == () and trusted.labels == 2 * N and found.canaries >= 20 and found.accepted == 0
    assert trusted.kappa is not None and trusted.kappa.value == 1
    pairs = [(data["first"], data["second"]) for data in map(shown, seen)]
    assert all((second, first) in pairs for first, second in pairs)
    assert trust_of(found, "other@http://h/v1", 0.05).faults, "labels of another candidate speak for that one alone"


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (verdict("first"), "turns with the order"),
        (verdict("second"), "turns with the order"),
        (verdict("tie"), "agreement not shown"),
        (verdict("tie"), "accepted a canary"),
        (obedient, "accepted a canary"),
        (convinced, "accepted a canary"),
        (kind_to_the_candidate, "kinder to one model"),
        (verdict("accept"), "too often no verdict"),
    ],
)
def test_another_is_not_believed(reply: Reply, fault: str) -> None:
    assert fault in trust_of(trial(reply), SMALL, 0.05).faults


@pytest.mark.parametrize("reply", [lambda body: (200, b"\xff nonsense"), lambda body: (500, {}), None])
def test_one_that_is_down_or_talks_nonsense_is_not_believed(reply: Reply | None) -> None:
    with server(reply or fair) as url:
        found = trial(url if reply else "http://127.0.0.1:1/v1")
    assert {"too few canaries", "too few labels"} <= set(trust_of(found, SMALL, 0.05).faults)


class Chooses:
    """A judge with one answer to all."""

    def __init__(self, found: Preference | None) -> None:
        self.found, self.asked = found, 0

    def accepts(self, question: object) -> bool | None:
        raise AssertionError("nobody asks this")

    def prefers(self, question: object, candidate: str) -> Preference | None:
        self.asked += 1
        return self.found


@pytest.mark.parametrize(
    ("found", "grade"),
    [
        (Preference("candidate", False), Grade(True, "preferred")),
        (Preference("current", False), Grade(False, "other preferred")),
        (Preference("tie", False), Grade(None, "tie")),
        (Preference("tie", True), Grade(None, "turned")),
        (Preference("tie", True, "first"), Grade(None, "first both times")),
        (Preference("tie", True, "second"), Grade(None, "second both times")),
        (None, Grade(None, "judge failed")),
    ],
)
def test_a_choice_and_its_grade(found: Preference | None, grade: Grade) -> None:
    judge, check = Chooses(found), Prefer(rubric="The better one.")
    assert Grader(judge=judge).grade(check, "one", "", "other") == grade
    assert Grader(judge=judge).grade(check, "one", "", "one") == Grade(None, "same")
    assert Grader(judge=judge).grade(check, " ", "", "other") == Grade(False, "empty")
    assert Grader(judge=judge).grade(check, "one", "", " ") == Grade(True, "preferred")
    assert Grader(judge=judge).grade(check, "one") == Grade(None, "no other answer")
    assert Grader().grade(check, "one", "", "other") == Grade(None, "no judge")
    assert judge.asked == 1


def test_a_judge_that_chooses_by_place_in_the_audit_itself_is_not_believed() -> None:
    def graded(*reasons: str) -> tuple[pa.Table]:
        rows = [{"record": i, "line": i, "check_sha256": "x", "reason": one} for i, one in enumerate(reasons)]
        return (pa.Table.from_pylist(rows, SCHEMA),)

    few = graded(
        *["tie", "preferred", "other preferred"] * 20, *["first both times"] * 10, "turned", "same", "compared"
    )
    assert place_problem(few) is None and place_problem(graded("compared", "same")) is None
    assert place_note("small", few) == (
        "small: the judge's choice turned with the order of the two answers in 11 of 71 pairs: 10 times it chose the "
        "first in both, 0 times the second. These are ties, and a tie is half an accepted answer."
    )
    assert "in 20 of 80 pairs" in (place_problem(graded(*["tie"] * 60, *["second both times"] * 20)) or "")


def test_what_a_choice_cannot_be(tmp_path: Path) -> None:
    for check in ({"type": "all", "checks": [CHECK, {"type": "json"}]}, {"type": "prefer", "rubric": " "}):
        with pytest.raises(UsageError, match="prefer"):
            parse_check(json.dumps(check))
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps({"prompt": "Hello", "check": CHECK, "gate": CHECK}))
    with pytest.raises(UsageError, match="no second answer"):
        check_gates(read_records(open_asked(file, PlanOptions()), None, None), "trace")
    with pytest.raises(UsageError, match="line 999"):
        try_pairs(AskedJudge(lambda *_: None), RECORDS, [PairLabel(999, "", "", "tie", SMALL)])
    from harness.audit.asked import AuditOptions

    with pytest.raises(UsageError, match="current"):
        check_labels(
            [PairLabel(1, "", "", "tie", "current")], AuditOptions(current="a@http://h/v1", candidates=[SMALL])
        )


def audited(
    path: Path, url: str, current: str, candidates: list[str], *more: str, labels: list[PairLabel] = LABELS
) -> tuple[int, dict[str, Any], str]:
    """(exit status, document, stderr), with labels for each candidate."""
    file = path.parent / "labels.jsonl"
    rows = ({"line": one.line, "current": one.current, "candidate": one.candidate, "better": one.better, "model": model}
            for one in labels for model in candidates)  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [one.partition("@")[0] for one in (current, *candidates)]
    prices = [x for name in names for x in ("--list-price", f"{name}={'2:8' if name == 'current' else '0.2:0.8'}")]
    asked = ("audit", path, "--current", current, *(x for one in candidates for x in ("--candidate", one)), *prices,
             "--slo", "ttft_p95=5s", "--rate", "100", "--margin", "5pt", "-o", path.parent / "audits", "--format",
             "json", "--judge", url, "--judge-model", "judge-7b", "--labelled", str(file), *more)  # fmt: skip
    done = harness(*asked, timeout=300)
    for _ in range(5):  # a load that this machine was too busy to measure is measured again
        found = json.loads(done.stdout or "{}")
        if not found or all(row["slo_met"] or row["problem"] or ":" in row["load"] for row in found["models"][:2]):
            break
        done = harness(*asked, "--resume", found["folder"], timeout=300)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def pairs_trace(path: Path, n: int) -> Path:
    rows = ({"arrival_s": i * 0.01, "prompt": f"Question {i}: which word belongs to the number {i}?", "max_tokens": 20,
             "check": CHECK} for i in range(n))  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_judge_that_is_not_believed_makes_an_audit_invalid_before_anybody_is_asked(tmp_path: Path) -> None:
    path = pairs_trace(tmp_path / "trace.jsonl", N)
    with server(verdict("first")) as url:
        code, found, heard = audited(path, url, "current@http://127.0.0.1:1/v1", [SMALL], "--keep-text")
    assert code == EXIT_INVALID, heard
    assert found["answers"][0]["verdict"]["word"] == "INVALID"
    assert "the judge is not to be believed" in found["answers"][0]["verdict"]["why"]


def test_pairs_decide_end_to_end(fake_server: StartServer, tmp_path: Path) -> None:
    """One candidate says the same in other words, the other has no word in a fifth of its answers."""
    n = 140
    path = pairs_trace(tmp_path / "trace.jsonl", n)
    current = plant(fake_server, tmp_path, "current", [[f"word{i}", f"the word{i}"] for i in range(n)])
    small = plant(fake_server, tmp_path, "small", [[f"it is word{i}"] for i in range(n)])
    poor = plant(fake_server, tmp_path, "poor", [[f"it is word{i}" if i % 5 else "no idea"] for i in range(n)])
    with server(fair) as url:
        code, _, heard = audited(path, url, current, [small])
        assert code == EXIT_USAGE and "--keep-text" in heard
        code, found, heard = audited(path, url, current, [small, poor], "--keep-text")
    assert code == EXIT_VALID, heard
    good, bad = found["answers"]
    assert good["verdict"]["word"] == "switch", good["sentence"]
    assert bad["verdict"]["word"] == "do not switch: worse", bad["sentence"]
    assert [row["accepted"]["value"] for row in found["models"]] == pytest.approx([0.5, 0.5, 0.4])
    assert good["judge"]["labels"] == 2 * N and good["judged"] is None
    assert found["noise"]["discordance"] == 0 and found["noise"]["n"] == n
    turned = [note for note in found["notes"] if "turned with the order" in note]
    assert len(turned) == 3 and all("in 0 of 140 pairs" in note for note in turned), turned
