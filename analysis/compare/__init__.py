"""Runs of two systems beside each other, and a run by the definitions of other tools."""
