"""Kinds of servers: what a deployment needs to know of one (`protocol`), vLLM, the known-truth fake server."""
