"""Questions to servers before, beside and after the load: what they serve, count and hold. Never the load itself."""

QUESTION = "harness-question"
"""How a server's log tells questions from load, which is of "harness"."""
