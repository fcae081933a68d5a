"""From the grades, tokens and loads of several models to the document of an audit.

In: tables of grades, loads, prices, what the user stated. Out: `analysis.audit.report.AuditReport`. All that decides is
in `analysis.quality`.
"""
