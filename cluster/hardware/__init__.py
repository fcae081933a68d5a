"""How fast a model can be, or is, on a chip that nobody here has: step times and limits for the simulator.

In: a model and a tier (`engine.engine_for`). Out: a `cluster.simulator` step time and limits, with where
they are from: *kernels* (NVIDIA's measurements, tables/NOTICE), *bound* (the chip's data sheet: no engine is faster) or
*fitted* (own runs). Whatever uses a figure from here says that it is simulated, and from which of the three.
"""
