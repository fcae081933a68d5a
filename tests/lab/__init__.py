"""Studies of known truth: every claim that decides money, held against an engine whose truth is known.

A small draw of each runs in the suite; ``make study`` (``python -m tests.lab``) runs the large ones and writes the
table "claimed against true" into analysis/INTERVALS.md.
"""
