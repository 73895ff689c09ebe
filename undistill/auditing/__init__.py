"""Attacks on a victim and its honest twin, measured and judged."""

MOST_SEEDS = 1000
