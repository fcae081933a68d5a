"""An OpenAI-compatible server of known truth: ``python -m harness.cluster.engines.fake.server``."""
