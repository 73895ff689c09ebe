"""`Database`: a file of SQLite that threads and processes share."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from undistill.core.errors import StoreError
from undistill.core.files import require_plain

SECONDS = 60.0  # that a process waits for another's transaction


class Database:
    """A transaction is on the disk when it ends, or was never there; whatever SQLite raises becomes a `StoreError`."""

    def __init__(self, path: Path, tables: Sequence[str], *, journal: str, otherwise: str) -> None:
        """
        Args:
            path: the file, made on first use, for its owner alone.
            tables: statements that make what is not there yet.
            journal: DELETE keeps one file; WAL is faster where many small transactions follow each other.
            otherwise: the option by which a user names another file.
        """
        self.path, self.tables, self.journal, self.otherwise = path, tables, journal, otherwise
        self._one_thread = threading.RLock()

    @cached_property
    def _connection(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        require_plain(self.path.parent)
        connection = sqlite3.connect(self.path, timeout=SECONDS, isolation_level=None, check_same_thread=False)
        self.path.chmod(0o600)
        for setting in ("trusted_schema = OFF", f"journal_mode = {self.journal}", "synchronous = FULL"):
            connection.execute(f"PRAGMA {setting}")
        for statement in self.tables:
            connection.execute(statement)
        return connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Inside, this thread alone uses the file."""
        try:
            with self._one_thread:
                yield self._connection
        except sqlite3.Error as error:
            raise StoreError(
                f"{self.path} cannot be used ({error}); restore it, or name another {self.otherwise}."
            ) from None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do all that is inside or nothing of it, while no other process writes."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
