"""Attacks without data, by whoever has the weights."""
