"""`harness audit` end to end on servers whose answers are planted, so that the right verdict is known."""

from __future__ import annotations

import json
import random
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeServer, StartServer, harness

from harness.audit.asked import STATE, parse_model, parse_price
from harness.audit.grades import FILE, read_grades
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_SLO_MISSED, EXIT_USAGE, EXIT_VALID, UsageError

N = 400
RIGHT, WRONG = "It is secretword{}, of course, as everyone knows.", "I do not know."
NOISE = 8
"""Records that the current model gets right the first time it is asked, and wrong from then on."""


def prompts(n: int = N) -> list[str]:
    return [f"Question {i}: which word belongs to the number {i}?" for i in range(n)]


def write_trace(path: Path, n: int = N) -> Path:
    rows = [
        {
            "arrival_s": i * 0.01, "prompt": prompt, "max_tokens": 20, "expected": f"secretword{i}",
            "check": {"type": "contains"}, "tags": {"task": "odd" if i % 2 else "even"},
        }
        for i, prompt in enumerate(prompts(n))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def serve(start: StartServer, folder: Path, model: str, right: Sequence[Sequence[bool]], *args: str) -> FakeServer:
    """A server that is right or wrong on each record as said, the first time, the second ..."""
    file = folder / f"{model}-answers.jsonl"
    rows = [
        {"prompt": prompt, "answers": [RIGHT.format(i) if good else WRONG for good in tries]}
        for i, (prompt, tries) in enumerate(zip(prompts(), right, strict=True))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # slow beside the 2.5 ms in which a worker may notice an end late, or Little's law would not hold within 5 %
    return start("--model", model, "--answers", str(file), "--ttft", "0.08", "--itl", "0.002", *args)


@dataclass(frozen=True)
class Planted:
    """What is planted: the current model is right on 70 %, `equal` on the same, `worse` on 5 points less."""

    current: str
    equal: str
    worse: str
    right: list[bool]

    @property
    def prices(self) -> list[str]:
        return ["--list-price", "current=2:8", *(x for name in ("equal", "worse")
                                                 for x in ("--list-price", f"{name}=0.2:0.8"))]  # fmt: skip


@pytest.fixture
def planted(fake_server: StartServer, tmp_path: Path) -> Planted:
    draw = random.Random(1)
    right = [i for i in range(N) if i < 0.7 * N]
    draw.shuffle(places := list(range(N)))
    good = [places[i] in right for i in range(N)]
    noisy = [i for i in range(N) if good[i]][:NOISE]
    lost = [i for i in range(N) if good[i]][NOISE : NOISE + N // 20]
    current = [(good[i], good[i] and i not in noisy) for i in range(N)]
    equal = [(good[i],) for i in range(N)]
    worse = [(good[i] and i not in lost,) for i in range(N)]

    def at(model: str, plan: Sequence[Sequence[bool]], *args: str) -> str:
        return f"{model}@{serve(fake_server, tmp_path, model, plan, *args).url}"

    return Planted(at("current", current), at("equal", equal), at("worse", worse), good)


def audit(trace: Path, planted: Planted, *more: str, candidates: Sequence[str]) -> tuple[int, dict[str, Any], str]:
    """(exit status, document, stderr) of an audit with one load level."""
    names = [one.partition("@")[0] for one in candidates]
    prices = [x for k, x in enumerate(planted.prices) if planted.prices[k - k % 2 + 1].partition("=")[0] in
              ("current", *names)]  # fmt: skip
    asked = (
        "audit", trace, "--current", planted.current, *(x for one in candidates for x in ("--candidate", one)), *prices,
        "--slo", "ttft_p95=5s", "--limit", str(N), "--rate", "200", "-o", trace.parent / "audits", "--format", "json",
        *more,
    )  # fmt: skip
    done = harness(*asked, timeout=300)
    for _ in range(0 if "--resume" in more else 5):  # a load that this machine was too busy to measure is done again
        found = json.loads(done.stdout or "{}")
        settled = ("not loaded: its quality is worse",)
        if not found or all(row["slo_met"] or row["problem"] or row["load"] in settled for row in found["models"]):
            break
        done = harness(*asked, "--resume", found["folder"], timeout=300)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_each_planted_truth_gets_its_verdict(planted: Planted, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    both = [planted.equal, planted.worse]
    code, found, said = audit(trace, planted, "--margin", "2pt", candidates=both)
    assert code == EXIT_VALID, said
    words = [answer["verdict"]["word"] for answer in found["answers"]]
    assert words == ["switch", "do not switch: worse"], [a["sentence"] for a in found["answers"]]
    equal, worse = found["answers"]
    assert equal["difference"]["value"] == pytest.approx(0)
    assert worse["difference"]["value"] == pytest.approx(-0.05)
    assert equal["usd_per_request"]["value"] == pytest.approx(0.1)
    assert [row["load"].partition(":")[0] for row in found["models"]] == ["200 req/s"] * 2 + ["not loaded"]
    assert not list(Path(found["folder"]).glob("load-2-*")), "what is worse needs no load"
    # the noise floor is what was planted: right the first time, wrong the second
    assert found["noise"]["discordance"] == pytest.approx(NOISE / N)
    assert found["models"][0]["accepted"]["value"] == pytest.approx(sum(planted.right) / N)
    # USD of the current model at its own lengths, by hand: words of prompt and answer are tokens
    tokens = [(len(p.split()), len((RIGHT.format(0) if good else WRONG).split()))
              for p, good in zip(prompts(), planted.right, strict=True)]  # fmt: skip
    by_hand = sum(2 * into + 8 * out for into, out in tokens) / N / 1e6
    assert found["models"][0]["usd_per_request"]["value"] == pytest.approx(by_hand)
    assert found["models"][0]["usd_per_accepted"]["value"] == pytest.approx(by_hand * N / sum(planted.right))

    folder = Path(found["folder"])
    grades = read_grades(next((folder / "quality").glob(f"001-*/{FILE}")).parent)
    assert grades.column("accepted").to_pylist() == planted.right
    # no word of an answer is left anywhere, and what holds prompts is its owner's alone
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"secretword" in path.read_bytes()] and "secretword" not in said
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (folder / "traces").iterdir())

    # it goes on where it was: nothing is asked again, and what was not loaded is, for its bill, if asked for
    more = ("--resume", str(folder), "--load-all")
    again, second, heard = audit(trace, planted, "--margin", "2pt", *more, candidates=both)
    assert again == EXIT_VALID, heard
    assert [a["verdict"]["word"] for a in second["answers"]] == words
    assert heard.count(": kept, ") == 6 and second["models"][2]["load"].startswith("200 req/s")
    other, _, refused = audit(trace, planted, "--margin", "3pt", "--resume", str(folder), candidates=both)
    assert other == EXIT_USAGE and "margin" in refused


def test_too_few_records_decide_nothing(planted: Planted, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "few.jsonl", 60)
    page = tmp_path / "audit.html"
    two = [planted.equal, "gone@http://127.0.0.1:1/v1"]
    code, found, said = audit(trace, planted, "--html", str(page), "--fail-if", "not-switch", candidates=two)
    assert code == EXIT_SLO_MISSED, said
    gone = found["answers"][1]["verdict"]
    assert gone["word"] == "INVALID" and "127.0.0.1:1" in gone["why"], "the others go on"
    verdict = found["answers"][0]["verdict"]
    assert verdict["word"] == "not decided" and "quality" in verdict["open"] and verdict["needed"] > 100
    assert "not decided" in page.read_text()
    state = json.loads((Path(found["folder"]) / STATE).read_text())
    assert state["checks_sha256"] == found["checks_sha256"]


def test_what_is_said_before_anybody_is_asked(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    asked = (
        "audit",
        trace,
        "--current",
        "a@http://127.0.0.1:1/v1",
        "--candidate",
        "smollm2-135m@aws-m7a.large",
        "--slo",
        "e2e=1s",
    )
    done = harness(*asked, "--dry-run", "--format", "json", "-o", tmp_path / "audits")
    assert done.returncode == EXIT_VALID, done.stderr
    plan = json.loads(done.stdout)
    assert [row["requests"] for row in plan["models"]] == [2 * N, N]
    assert plan["models"][0]["usd"] is None and plan["models"][1]["usd"] > 0
    needed = {one["discordance"]: one["records_needed"] for one in plan["power"]}
    assert needed[0.1] == pytest.approx(1963, rel=0.05)
    assert not (tmp_path / "audits").exists()

    unknown = harness(*(str(word).replace("m7a", "m0x") for word in asked), "-o", tmp_path / "audits")
    assert unknown.returncode == EXIT_USAGE and "aws-m0x" in unknown.stderr, unknown.stderr
    assert not (tmp_path / "audits").exists(), "nothing is written before all models are known"

    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"arrival_s": 0, "prompt": "a"}\n{"arrival_s": 1, "prompt": "b"}\n')
    done = harness("audit", bare, *asked[2:], "-o", tmp_path / "audits")
    assert done.returncode == EXIT_NOT_DECIDED and "quality not measured" in done.stderr

    gone = harness(*asked[:4], "--candidate", "b@http://127.0.0.1:1/v1", *asked[6:], "-o", tmp_path / "audits")
    assert gone.returncode == EXIT_INVALID, gone.stderr


def test_how_a_model_and_a_price_are_written() -> None:
    pair = parse_model("org/a@aws-m7a.large@http://127.0.0.1:1/v1")
    assert (pair.model, pair.tier, pair.base_urls) == ("org/a", "aws-m7a.large", ("http://127.0.0.1:1/v1",))
    assert parse_model("a@http://h/v1").tier is None and not parse_model("a@t").base_urls
    assert parse_price("a/b=2.5:10:0.25") == ("a/b", 2.5, 10.0, 0.25)
    for text in ("a", "@t", "a@", "@http://h/v1"):
        with pytest.raises(UsageError):
            parse_model(text)
    for text in ("a", "a=1", "=1:2", "a=x:1", "a=1:-2"):
        with pytest.raises(UsageError):
            parse_price(text)
