"""Attacks that guess what an answer was before it was defended."""
