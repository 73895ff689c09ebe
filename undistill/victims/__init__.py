"""Victims: networks and the responses over them, and black boxes, as an attacker meets them."""

from undistill.core.discover import import_all

import_all(__path__, __name__)
