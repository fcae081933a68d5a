"""From the files of a run to columns, one entry a request, and its gaps between tokens pooled. Decides nothing."""
