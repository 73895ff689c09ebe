"""Exported folders."""
