"""docs/ACCURACY.md and cluster/hardware/errors.json from what was simulated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.accuracy.fit import Floats
from tests.accuracy.rows import Row

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "cluster" / "hardware" / "errors.json"
PAGE = ROOT / "docs" / "ACCURACY.md"
METRICS = ("TTFT", "TPOT", "cost")


def errors(kept: Sequence[Row], answers: Floats) -> Floats:
    """Relative errors of TTFT, TPOT and cost, [row, 3]; cost: end to end, so USD per token at that concurrency."""
    return _three(kept, answers) / _three(kept, np.array([[r.ttft_ms, r.tpot_ms] for r in kept])) - 1


def _three(kept: Sequence[Row], values: Floats) -> Floats:
    return np.column_stack([values, values[:, 0] + values[:, 1] * np.array([r.outputs - 1 for r in kept])])


def summary(found: Floats) -> dict[str, tuple[float, float]]:
    """Median and p90 of the absolute error in %, by metric."""
    size = np.abs(found) * 100
    return {
        name: (round(float(np.median(size[:, k])), 1), round(float(np.quantile(size[:, k], 0.9)), 1))
        for k, name in enumerate(METRICS)
    }


def _cells(found: Floats) -> str:
    return " | ".join(f"{median:.1f} / {p90:.1f}" for median, p90 in summary(found).values())


def write(kept: Sequence[Row], answers: Mapping[str, Floats], refused: Sequence[Row], others: Floats) -> None:
    """Write both."""
    package = np.array([[r.package_ttft_ms, r.package_tpot_ms] for r in kept])
    found = {name: errors(kept, values) for name, values in answers.items()}
    own = errors(kept, package)
    figures: dict[str, object] = {
        "rows": len(kept),
        "all": {name: summary(values) for name, values in {**found, "package": own}.items()},
        "chips": _groups(kept, found["chip_left_out"], lambda row: row.chip),
        "models": _groups(kept, found["model_left_out"], lambda row: f"{row.model} {row.precision}"),
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    lines = [f"{name.replace('_', ' ')} | {_cells(values)}" for name, values in found.items()]
    table = ["| | TTFT | TPOT | cost |", "|---|---|---|---|", *(f"| {line} |" for line in lines)]
    table.append(f"| aiconfigurator-core's own estimate | {_cells(own)} |")
    print("\n".join(table))
    by_group = [
        "| chip | model | rows | TTFT | TPOT | cost | package: TTFT | TPOT | cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for block, these, values in (("", kept, answers["chip_left_out"]), ("refused: ", refused, others)):
        groups = sorted({(row.chip, row.model, row.precision, row.refused or "") for row in these})
        for group in groups:
            mine = [k for k, r in enumerate(these) if (r.chip, r.model, r.precision, r.refused or "") == group]
            some = [these[k] for k in mine]
            theirs = np.array([[r.package_ttft_ms, r.package_tpot_ms] for r in some])
            label = f"{group[1].split('/')[-1]} {group[2]}" + (f" ({block}{group[3]})" if group[3] else "")
            by_group.append(
                f"| {group[0].split('_')[0].upper()} | {label} | {len(mine)} | {_cells(errors(some, values[mine]))} | "
                f"{_cells(errors(some, theirs))} |"
            )
    print("\n".join(by_group))


def _groups(
    kept: Sequence[Row], found: Floats, group: Callable[[Row], str]
) -> dict[str, dict[str, tuple[float, float]]]:
    names = np.array([group(row) for row in kept])
    return {name: summary(found[names == name]) for name in sorted(set(names))}
