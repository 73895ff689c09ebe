"""`train`, `adopt`, `protect`, `audit` and `compare`: what the command line and the README call."""

from undistill.api.audits import audit
from undistill.api.comparisons import compare
from undistill.runs.adopt import adopt
from undistill.runs.protect import protect
from undistill.runs.train import train

__all__ = ["adopt", "audit", "compare", "protect", "train"]
