"""Experiments of papers: each is a function from a scale to the cases that it measures."""
