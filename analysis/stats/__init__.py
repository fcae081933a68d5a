"""A value and how far to trust it: intervals of samples that are alike, of runs that were repeated, of fits."""
