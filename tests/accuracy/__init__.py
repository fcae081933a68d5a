"""How far simulated figures are from silicon: docs/ACCURACY.md and what it is made of.

``python -m tests.accuracy`` fits the constants of `cluster.hardware.kernels`, with every chip and every model left out
in turn, and writes the page and cluster/hardware/errors.json (ten minutes). ``python -m tests.accuracy page`` writes
them from answers.npz alone; ``python -m tests.accuracy.collect`` makes the rows and their tables anew from NVIDIA's
package.
"""
