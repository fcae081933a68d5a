"""A continuous-batching engine of known truth, in virtual time: requests in, the time of every token out.

In: when requests come and how long they are, admission limits (`scheduler.Limits`), what a step costs
(`step_time.StepTime`). Out: `replica.Outcome`. Numpy and the standard library only, deterministic, no sockets, no Ray.
The same scheduler paces the fake server in real time (``python -m harness.cluster.engines.fake.server --step``).
Nothing here was measured: whatever uses a figure from here says that it is simulated.
"""
