"""Servers and load workers as processes: weights, tiers, process groups, Ray deployments. ray is imported only here."""
