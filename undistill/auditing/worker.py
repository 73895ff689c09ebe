"""A process of a pool: it does one cell after another, and ends with its parent.

This module imports nothing heavy: from its first moment on, long before torch is imported, the process watches whether
its parent is still there.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from undistill.core.errors import LaunchError, LegibleFormatter, UndistillError


def serve(pipe: Connection, number: int) -> None:
    """Perform the orders that come through `pipe`, and send back each result or error. `number` counts workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if logging.lastResort:
        logging.lastResort.setFormatter(LegibleFormatter())
    orders = import_module("undistill.auditing.order")
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        pipe.send(_result(orders.perform, order, number))


def _result(perform: Any, order: Any, number: int) -> Any:
    try:
        return perform(order, number)
    except SystemExit as error:
        return LaunchError(f"The code of a cell ended its worker (SystemExit: {error}); it may not call sys.exit.")
    except Exception as error:
        if not isinstance(error, UndistillError):  # whose message is for the user, and says it all
            error.add_note("In a worker process:\n" + traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error of the user's own that cannot travel
            return RuntimeError(traceback.format_exc())
        return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
