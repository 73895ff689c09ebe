"""The versions and the hardware on which a result was made."""

import platform
from collections import defaultdict
from typing import Any

import numpy
import torch

import undistill
from undistill.core.identity import package_sha256

Record = dict[str, Any]


def environment(device: torch.device) -> Record:
    """Versions and hardware, for the record."""
    return {
        "undistill": undistill.__version__,
        "code": package_sha256()[:8],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def described(environment: Record) -> str:
    """The part of it on which bits depend, in one line."""
    known = defaultdict(lambda: "?", environment)
    return "undistill {undistill} (code {code}), torch {torch}, {device}, {threads} threads".format_map(known)
