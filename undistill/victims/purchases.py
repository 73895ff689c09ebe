"""`Purchases`: answers that were bought of a black box, one row for each, in a file of SQLite."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from undistill.core.database import Database
from undistill.core.errors import StoreError
from undistill.core.files import locked

ASKED_AT_ONCE = 500  # keys of one SELECT
TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, served BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID",
)


class Purchases:
    """Answers by key, and how many were billed. Whatever process bought one, all others find it.

    Rows hold `classes` log-probabilities each, as `Answer.to_served` writes them.
    """

    def __init__(self, path: Path, classes: int) -> None:
        self.path, self.classes = path, classes
        self._file = Database(path, TABLES, journal="DELETE", otherwise="--ledger")

    def __reduce__(self) -> tuple[type["Purchases"], tuple[Path, int]]:
        """Another process opens the file anew."""
        return Purchases, (self.path, self.classes)

    def find(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The answers (K,) that were bought under these keys."""
        found: dict[str, Tensor] = {}
        if not self.path.exists():
            return found
        with self._file.reading() as database:
            for first in range(0, len(keys), ASKED_AT_ONCE):
                some = keys[first : first + ASKED_AT_ONCE]
                query = f"SELECT key, served FROM answers WHERE key IN ({','.join('?' * len(some))})"
                found |= {key: self._read(served) for key, served in database.execute(query, some)}
        return found

    def add(self, keys: Sequence[str], served: Tensor) -> None:
        """Keep answers (N, K) that were just billed; they are on the disk when this returns."""
        rows = zip(keys, served.to(torch.float32).cpu().numpy(), strict=True)
        with self._file.transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", [(key, row.tobytes()) for key, row in rows]
            )
            self._count(database, "billed", len(keys))

    def bill(self, name: str, count: int) -> None:
        """Count images that were asked and whose answers are not kept, under a `name` such as 'billed' or 'lost'."""
        with self._file.transaction() as database:
            self._count(database, name, count)

    def number(self, name: str) -> int:
        """How many images were counted under that name."""
        if not self.path.exists():
            return 0
        with self._file.reading() as database:
            row = database.execute("SELECT number FROM counts WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    @property
    def billed(self) -> int:
        """Images that were answered, again each time that they were."""
        return self.number("billed")

    @property
    def distinct(self) -> int:
        """Answers that are kept: one for each image, or for each asking where answers vary."""
        if not self.path.exists():
            return 0
        with self._file.reading() as database:
            return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this process alone buys; others wait, and find what it bought."""
        with locked(self.path.with_suffix(".lock")):
            yield

    @staticmethod
    def _count(database: sqlite3.Connection, name: str, number: int) -> None:
        database.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET number = number + excluded.number",
            (name, number),
        )

    def _read(self, served: object) -> Tensor:
        if isinstance(served, bytes) and len(served) == 4 * self.classes:
            values = np.frombuffer(served, np.float32)
            if np.isfinite(values).all():
                return torch.from_numpy(values.copy())
        raise StoreError(f"{self.path} holds an answer that is none of {self.classes} classes; name another --ledger.")
