"""From result rows to figures with intervals, a verdict and a price. Reads files; never sends, never starts anything.

A package or module imports only those to its left: ``rows``, ``stats``, ``metrics``, ``rates``,
``steady``, ``validity``, ``fidelity``, ``cost``, ``flat``, ``summary``, ``capacity``, ``pricing``, ``compare``,
``quality``, ``audit``, ``report``, ``api``. Every definition is in METRICS.md.
"""
