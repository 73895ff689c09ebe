"""Attacks that begin with the victim's weights."""
