"""Defences that change answers only."""
