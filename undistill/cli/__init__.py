"""The command line."""

from undistill.cli.commands import app

__all__ = ["app"]
