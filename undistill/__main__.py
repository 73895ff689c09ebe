"""Entry point of `undistill` and `python -m undistill`."""

import os
import signal
import sys


def _end(number: int, _: object) -> None:
    """Before the command line is there to say it in order."""
    interrupted = number == signal.SIGINT
    os.write(2, f"Error: {'Interrupted' if interrupted else 'Terminated'} before anything was begun.\n".encode())
    os._exit(130 if interrupted else 143)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    from undistill.cli import app
    from undistill.cli.options import LAUNCHED

    try:
        app(prog_name="undistill")
    except SystemExit as end:
        if not LAUNCHED:
            raise
        # DDP's reducer keeps gloo's threads alive, and an interpreter that takes itself apart beside them may abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)


if __name__ == "__main__":
    main()
