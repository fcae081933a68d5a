"""Is the load what the trace was: plan against trace, sent against plan, each difference with a bound."""
