"""What an audit asks, and what it keeps: its records, the traces made of them for each pass, grades by record.

In: a trace whose records carry checks. Out: plans' traces and a file of grades per pass. Who is asked and when is
`harness.cli.runner.audit`; what the grades prove is `analysis.quality`.
"""
