"""Work that native code may crash, hang or fill memory with, tried in a child process first."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

SECONDS = 300.0
FORKS = sys.platform == "linux"  # elsewhere, forking beside native libraries is unsafe
PR_SET_PDEATHSIG = 1


def in_child(check: Callable[[], str], *, seconds: float = SECONDS, memory: int | None = None) -> str:
    """Run `check` in a child process and return its answer, or how the child ended if it gave none.

    An empty answer means that nothing is wrong. The child may take `seconds`, and allocate `memory` bytes more than
    this process has. It is forked, so that any network can be checked as it is; it computes on one thread, since
    OpenMP's threads do not survive a fork. Where `FORKS` is false, `check` runs in this process.
    """
    if not FORKS:
        return check()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(check, sender, seconds, memory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads that hold locks: see _answer
        child.start()
    sender.close()
    answer = ""
    try:
        if not receiver.poll(seconds):
            return f"no end after {seconds:.0f} seconds"
        with suppress(EOFError):  # it died
            answer = receiver.recv()
        child.join(10)
    finally:
        child.kill()
        child.join()
        receiver.close()
    return answer if child.exitcode == 0 else death(child.exitcode)


def _answer(check: Callable[[], str], sender: Connection, seconds: float, memory: int | None) -> None:
    """The child: it does not outlive its parent, holds nothing of his open, is silent, and leaves no core file."""
    import faulthandler
    import resource

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(math.ceil(seconds) + 1)
    for name in os.listdir("/proc/self/fd"):  # a pipe held open here would hide the death of its owner
        if int(name) > 2 and int(name) != sender.fileno():
            with suppress(OSError):
                os.close(int(name))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # glibc reports a corrupted heap there
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    sender.send(check())
    os._exit(0)


def is_native_fault(exitcode: int | None) -> bool:
    """Whether a process with this exit code was ended by a fault in native code."""
    return exitcode in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE)


def death(exitcode: int | None) -> str:
    """How a process ended that should not have, in words: 'SIGSEGV, a fault in native code'."""
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    if is_native_fault(exitcode):
        return f"{name}, a fault in native code"
    return f"{name}, most likely for lack of memory" if exitcode == -signal.SIGKILL else name
