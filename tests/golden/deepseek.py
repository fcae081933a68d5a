"""DeepSeek's published day of serving (27 to 28 February 2025): averages, tokens and prices as published."""

NODES = 226.75
USD_PER_HOUR = 8 * 2.0
"""Eight H800 at 2 USD an hour."""
INPUT, CACHED_INPUT, OUTPUT = 608e9, 342e9, 168e9
PREFILL_PER_S, DECODE_PER_S = 73.7e3, 14.8e3
"""Tokens per second and node, cached input included."""
