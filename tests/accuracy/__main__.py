"""``python -m tests.accuracy``: fit, compare, write the page and the errors (see the package's docstring)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from harness.cluster.hardware.kernels import Constants
from tests.accuracy.fit import Floats, sensitivities, simulate_all, step
from tests.accuracy.open_loop import compare, over_bound
from tests.accuracy.page import write
from tests.accuracy.rows import Row, rows, simulated

HERE = Path(__file__).parent
START = Constants()
PROTOTYPE = Constants(mixed=1.18, launch_s=0.74e-3, arrival_s=3.5e-3, arrival_per_token_s=6.5e-6, host_s=0.3e-3)
ROUNDS = 1
"""The start is where an earlier fit ended; a change of the tables or the scheduler may want a second."""


def without(kept: list[Row], found: Floats, measured: Floats, at: Constants, group: Callable[[Row], str]) -> Floats:
    """What constants fitted without a row's group make of it, [row, 2]."""
    answers = np.zeros((len(kept), 2))
    groups = np.array([group(row) for row in kept])
    for name in sorted(set(groups)):
        left = groups != name
        constants = step(found[:, left], measured[left], START, at)
        print(f"without {name}: {constants}", file=sys.stderr)
        mine = np.flatnonzero(~left)
        answers[mine] = simulate_all(simulated, [kept[k] for k in mine], constants, POOL)
    return answers


def main() -> None:
    """Fit to the supported rows, twice linearised; refused ones are only compared."""
    everything = rows()
    kept = [row for row in everything if row.refused is None]
    measured = np.array([[row.ttft_ms, row.tpot_ms] for row in kept])
    constants = START
    for _ in range(ROUNDS):
        found = sensitivities(simulated, kept, constants, POOL)
        at, constants = constants, step(found, measured, START, constants)
        print(constants, file=sys.stderr)
    answers = {
        "prototype": simulate_all(simulated, kept, PROTOTYPE, POOL),
        "in_sample": simulate_all(simulated, kept, constants, POOL),
        "chip_left_out": without(kept, found, measured, at, lambda row: row.chip),
        "model_left_out": without(kept, found, measured, at, lambda row: row.model),
    }
    refused = [row for row in everything if row.refused is not None]
    others = simulate_all(simulated, refused, constants, POOL)
    np.savez_compressed(HERE / "answers.npz", refused=others, **answers)
    (HERE / "constants.json").write_text(json.dumps(asdict(constants), indent=1) + "\n")


def page() -> None:
    """Compare with the other sources, and write."""
    with np.load(HERE / "answers.npz") as file:
        answers = {name: file[name] for name in file.files}
    others = answers.pop("refused")
    everything = rows()
    kept, refused = [[r for r in everything if (r.refused is None) is good] for good in (True, False)]
    write(kept, answers, refused, others, compare(), over_bound())


if __name__ == "__main__":
    if sys.argv[1:] != ["page"]:
        with ProcessPoolExecutor(2) as POOL:
            main()
    page()
