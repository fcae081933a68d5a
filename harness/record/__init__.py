"""The record of a run: its manifest, a row per request, and what workers, servers and machines did each second."""
