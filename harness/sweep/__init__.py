"""Many runs of one trace (models x tiers x loads x repeats): what is asked, how far it is, what it costs."""
