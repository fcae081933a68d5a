"""What the verbs that send load share: which servers, the steps of a run, and runs one after another on them.

In: options and a trace or a plan. Out: run directories, which `harness.cli.select_runs` finds again.
"""
