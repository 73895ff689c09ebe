"""Attacks that ask for answers to other images than the owner's."""
