"""Run the studies and write the table: ``python -m tests.lab [--draws N] [--seed S] [--jobs J] [--only NAME ...]``.

The lines of each study are kept in ``tests/lab/results/`` with the command, seed and commit that made them, and a hash
of the code that they are about; the table in analysis/INTERVALS.md is made of all of them and of `CITED`, so that one
study can be run again alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tomllib
from dataclasses import asdict
from pathlib import Path

from tests.lab.measured import fingerprint
from tests.lab.table import Row

DRAWS = {
    "capacity": 200, "sessions": 200, "intervals": 300, "longer": 60, "closed": 300, "repeats": 300, "fleet": 20,
    "compare": 100, "audit": 2000, "scheduler": 1000,
}  # fmt: skip
"""Studies, modules with ``rows(draws, seed, jobs)``, and how many draws each takes when nothing else is said."""
HERE = Path(__file__).parent
CITED, RESULTS = HERE / "cited.toml", HERE / "results"
PAGE = HERE.parents[1] / "analysis" / "INTERVALS.md"
BEGIN, END = "<!-- claimed against true: begin -->", "<!-- claimed against true: end -->"
WORDS = {True: "holds", False: "MISSED", None: "open"}


def cited() -> list[Row]:
    """Lines that a test of the suite proves, and those that are open."""
    return [
        Row(
            item=row["item"], claim=row["claim"], truth=row["truth"], claimed=row["claimed"], draws=row.get("draws", 1),
            holds=row.get("holds"), command=row.get("test", ""),
        )
        for row in tomllib.loads(CITED.read_text())["row"]
    ]  # fmt: skip


def kept() -> list[Row]:
    """Lines of the studies that were run."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        study = json.loads(path.read_text())
        made = f"{study['command']} (commit {study['commit']})"
        found += [Row(**{**row, "command": made}) for row in study["rows"]]
    return found


def run(name: str, draws: int, seed: int, jobs: int) -> None:
    """Run one study and keep its lines."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    rows = importlib.import_module(f"tests.lab.{name}").rows(draws, seed, jobs)
    for row in rows:
        print(f"{row.item:4} {row.claim}: {row.claimed} [{WORDS[row.holds]}]", flush=True)
    study = {
        "command": f"python -m tests.lab --only {name} --draws {draws} --seed {seed}", "commit": commit.stdout.strip(),
        "code": fingerprint(name), "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(study, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """The table as the page holds it."""
    lines = ["| item | claim | truth | what the product says | draws | | proof |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (int(re.sub(r"\D", "", row.item)), row.item)):
        cells = (row.item, row.claim, row.truth, row.claimed, str(row.draws), WORDS[row.holds])
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + f" | `{row.command}` |")
    return "\n".join(lines).replace("`` ", "").replace("| `` |", "| |")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="default: by study")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=DRAWS, default=list(DRAWS), help="none: write the table alone")
    args = parser.parse_args()
    for name in args.only:
        run(name, args.draws or DRAWS[name], args.seed, args.jobs)
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n{table([*cited(), *kept()])}\n{after}")


if __name__ == "__main__":
    main()
