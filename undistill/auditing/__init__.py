"""Attacks on a victim and its honest twin, measured and judged."""
