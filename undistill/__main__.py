import os
import sys

from undistill.cli import app
from undistill.options import LAUNCHED

try:
    app(prog_name="undistill")
except SystemExit as end:
    if not LAUNCHED:
        raise
    # DDP's reducer keeps gloo's threads alive, and an interpreter that takes itself apart beside them may abort
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else 0)
