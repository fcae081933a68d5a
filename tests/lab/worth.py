"""What a run can know at best: how many independent requests it is worth, by the variance of its own process.

A long run is cut into windows of a run's length; the share of each that keeps a limit differs from window to window.
Intervals of one run cannot honestly be narrower than that (in the mean of their squares). ``python -m tests.lab.worth``
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.lab.intervals import FULL, KEPT, Cell
from tests.lab.processes import at_rate, serve, workload

CELLS = (
    Cell("bursty", 0.5, 60.0), Cell("bursty", 0.5, 300.0), Cell("bursty", 0.7, 300.0), Cell("bursty", 0.85, 300.0),
    Cell("poisson", 0.7, 300.0),
)  # fmt: skip


def half_widths(cell: Cell, requests: int, seed: int, shares: tuple[float, ...]) -> list[float]:
    """Of the 95 % interval of a share of requests that keep a limit on ttft, for each share."""
    outcome = serve(at_rate(workload(cell.kind, requests, seed), cell.busy * FULL))
    start = requests // 10
    ttft = (outcome.first_token_s - outcome.due_s)[start:]
    window = ((outcome.due_s[start:] - outcome.due_s[start]) / cell.seconds).astype(np.int64)
    sizes = np.bincount(window)[:-1]  # the last window is not full
    found = []
    for share in shares:
        kept = np.bincount(window, weights=ttft <= np.quantile(ttft, share))[:-1]
        found.append(1.96 * float(np.std((kept - share * sizes) / sizes.mean())))
    return found


def main() -> Iterator[str]:
    """A line for each cell."""
    shares = (*KEPT, 0.99)
    for cell in CELLS:
        said = [
            f"{share:.1%} +-{half:.1%} (worth {share * (1 - share) * (1.96 / half) ** 2:.0f})"
            for share, half in zip(shares, half_widths(cell, 250_000, 9, shares), strict=True)
        ]
        yield f"{cell.kind}, {cell.busy:.0%} busy, {cell.seconds:.0f} s: " + ", ".join(said)


if __name__ == "__main__":
    print(*main(), sep="\n")
