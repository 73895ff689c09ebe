"""Attacks that know of defences and adapt to them."""
