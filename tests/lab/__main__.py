"""Run the studies and write the table: ``python -m tests.lab [--draws N] [--seed S] [--jobs J] [--only NAME ...]``."""

from __future__ import annotations

import argparse
import importlib
import subprocess
from pathlib import Path

from tests.lab.table import Row

STUDIES = ("capacity", "intervals", "repeats", "fleet", "compare")
"""Modules with ``rows(draws, seed, jobs)``."""
CITED = Path(__file__).with_name("cited.toml")
PAGE = Path(__file__).parents[2] / "analysis" / "METRICS.md"
BEGIN, END = "<!-- claimed against true: begin -->", "<!-- claimed against true: end -->"
DRAWS = {"capacity": 200, "intervals": 200, "repeats": 300, "fleet": 10, "compare": 100}


def cited() -> list[Row]:
    """Lines that a test of the suite proves, and those that are open."""
    import tomllib

    return [
        Row(
            item=row["item"], claim=row["claim"], truth=row["truth"], claimed=row["claimed"], draws=row.get("draws", 1),
            holds=row.get("holds"), command=row.get("test", ""),
        )
        for row in tomllib.loads(CITED.read_text())["row"]
    ]  # fmt: skip


def markdown(rows: list[Row], command: str) -> str:
    """The table as the page holds it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    words = {True: "holds", False: "MISSED", None: "open"}
    lines = [
        f"Made by `{command}` at commit {commit.strip()}.", "",
        "| item | claim | truth | what the product says | draws | | proof |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: (int("".join(c for c in row.item if c.isdigit())), row.item)):
        proof = f"`{row.command}`" if row.command else ""
        lines.append(
            f"| {row.item} | {row.claim} | {row.truth} | {row.claimed} | {row.draws} | {words[row.holds]} | {proof} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, help="default: by study")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(STUDIES))
    parser.add_argument("--dry-run", action="store_true", help="print the table, do not write it into the page")
    args = parser.parse_args()
    rows = cited()
    for name in args.only:
        study = importlib.import_module(f"tests.lab.{name}")
        draws = args.draws or DRAWS[name]
        for row in study.rows(draws, args.seed, args.jobs):
            print(f"{row.item:4} {row.claim}: {row.claimed} [{row.holds}]", flush=True)
            proof = f"python -m tests.lab --only {name} --draws {draws} --seed {args.seed}"
            rows.append(row if row.command else Row(**{**_fields(row), "command": proof}))
    table = markdown(rows, "make study")
    if args.dry_run:
        print(table)
        return
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{after}")


def _fields(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in Row.__slots__}


if __name__ == "__main__":
    main()
