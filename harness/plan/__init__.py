"""The plan: every request, its prompt and its time, made from a trace and written to a file before the clock starts."""
