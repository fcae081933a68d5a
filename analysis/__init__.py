"""From result rows to figures with intervals, a verdict and a price. Reads files; never sends, never starts anything.

``load`` rows and plan -> ``metrics`` -> ``intervals`` -> ``validity`` -> ``price`` -> ``summary`` -> ``report``.
Every definition is in METRICS.md, INTERVALS.md and PRICES.md.
"""
