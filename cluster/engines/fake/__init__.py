"""An OpenAI-compatible server of known truth: ``python -m cluster.engines.fake.server``."""
