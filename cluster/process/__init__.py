"""Processes that end with their owner, a record of what runs, and what it holds of this host."""
