"""Attacks that imitate the victim's answers to the attacker's images."""
