"""Errors that the user can mend. The command line prints them and exits with 2."""

import logging
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from typing import TypeGuard

log = logging.getLogger(__name__)


class UndistillError(Exception):
    """The message says what is wrong, why, and what to do."""


class SpecError(UndistillError):
    """A spec, field or setting that does not exist or is out of range."""


class DataError(UndistillError):
    """Images or labels that cannot be used."""


class ModelError(UndistillError):
    """A network or its weights that cannot be used."""


class Unsuitable(ModelError):
    """A sound network that an attack cannot be tried on."""


class VictimError(UndistillError):
    """A black box that does not answer, or whose answers cannot be used; what was bought before is kept."""


class StoreError(UndistillError):
    """A run folder that holds something else, is unfinished, or is damaged."""


class FileError(UndistillError):
    """A file that is not a regular one, is too large, or leads out of the folder in which it lies."""


class AccessDenied(UndistillError):
    """An attack asked its oracle for more than it declared."""


class BudgetExceeded(UndistillError):
    """An attack asked its oracle more questions than it may."""


class NonFinite(UndistillError):
    """A number that is NaN or infinite where something is trained, measured or stored; nothing of it was kept."""


class LaunchError(UndistillError):
    """Worker processes that cannot be reached, or keep dying."""


def legible(text: str) -> str:
    """`text` without what a terminal or a page might obey or not be able to show, which is written as escapes."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # where Python puts the bytes of a file name that are not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode("ascii")


@cache
def remark(text: str) -> None:
    """Tell the user what he should know of what he gave, once in a process."""
    log.warning(text)


def short_of_memory(error: BaseException) -> bool:
    """Whether memory is lacking: torch says so in a RuntimeError, and in other words on every device."""
    return isinstance(error, MemoryError) or any(w in str(error) for w in ("allocate memory", "out of memory"))


class LegibleFormatter(logging.Formatter):
    """Messages quote files of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return legible(super().format(record))


def refused(error: BaseException) -> TypeGuard[OSError]:
    """Whether the machine refuses (a full disk, a missing right), so that no file's content is to blame."""
    return isinstance(error, OSError) and isinstance(error.errno, int)


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """'no attack named 'SoftLabel'; did you mean 'SoftLabels'? (choices: ...)'."""
    choices = sorted(choices)
    folded = {choice.casefold(): choice for choice in choices}
    near = get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean '{folded[near[0]]}'?" if near else "."
    return f"No {what} named '{name}'{hint} Valid: {', '.join(choices)}."
