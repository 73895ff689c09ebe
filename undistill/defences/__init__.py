"""Defences, one file each; every file in this folder is found on its own."""

from undistill.defences.defence import Defence
from undistill.discover import import_all

import_all(__path__, __name__)

__all__ = ["Defence"]
