"""Victims: networks, and the responses over them, as an attacker meets them."""
