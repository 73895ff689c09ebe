"""`train`, `adopt`, `protect`, `audit`, `compare`, `export` and `serve`: what the command line and the README call."""

from undistill.api.audits import audit
from undistill.api.comparisons import compare
from undistill.runs.adopt import adopt
from undistill.runs.protect import protect
from undistill.runs.train import train
from undistill.serving.server import serve
from undistill.ship.export import export

__all__ = ["adopt", "audit", "compare", "export", "protect", "serve", "train"]
