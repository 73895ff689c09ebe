"""Attacks, one file each; every file in this folder is found on its own."""

from undistill.attacks.attack import Attack
from undistill.core.discover import import_all

import_all(__path__, __name__)

__all__ = ["Attack"]
