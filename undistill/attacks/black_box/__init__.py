"""Attacks that query a victim with images of their own making."""
