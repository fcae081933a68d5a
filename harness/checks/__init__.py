"""Is an answer right? Checks that a trace names for its records, from exact words to a program in a sandbox.

In: the JSON of a check (`harness.checks.spec`) and an answer, which is hostile. Out: a `harness.checks.grade.Grade` in
bounded time and memory, with a reason from a closed set that never quotes the answer. Nothing here raises once the
check itself was read, and None says "could not be graded", which is neither right nor wrong.
"""
