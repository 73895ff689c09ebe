"""Defences, one file each; every file in this folder is found on its own."""

from undistill.core.discover import import_all
from undistill.defences.defence import Defence

import_all(__path__, __name__)

__all__ = ["Defence"]
