"""What each verb does; `harness.cli` holds their options and help.

Only this package and `harness.cli` see all four packages, and only inside functions, so that a replay against an
existing server loads neither Ray nor vLLM.
"""
