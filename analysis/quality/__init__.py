"""Is a candidate model as good as the current one on the same records, and what does an accepted answer cost?

In: grades (1 accepted, 0 not, NaN could not be graded) and money of both models for the same records, by session.
Out: paired differences with intervals and tests, sample sizes, the bill that the price of tokens hides, cascades, and
a verdict in one of a closed set of words. Pure functions of arrays: nothing here asks a model, reads a file or prints.
"""
