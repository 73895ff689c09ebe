"""Attacks that use labels alone: the floors of every comparison."""
