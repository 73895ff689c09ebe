"""`Keys`: who may ask, how many images each may ask about, and how many they did, in a file of SQLite."""

import hashlib
import hmac
import re
import secrets
import sqlite3
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from undistill.core.database import Database
from undistill.core.errors import SpecError, StoreError, unknown
from undistill.serving.refusals import Refusal

KEYS = "keys.sqlite"
ANYBODY = "anybody"
"""The account of all who ask without a key, where none is needed."""
NEEDED = "A key is needed: send it as 'Authorization: Bearer KEY'."
DAY = 86_400.0  # seconds
NAME = re.compile(r"[\w.@-]{1,64}")
TABLES = (
    "CREATE TABLE IF NOT EXISTS salt (value BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, id TEXT UNIQUE, hash BLOB, budget INTEGER,"
    " asked INTEGER NOT NULL DEFAULT 0, unanswered INTEGER NOT NULL DEFAULT 0, different INTEGER NOT NULL DEFAULT 0,"
    " made REAL NOT NULL, ends REAL, revoked REAL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS images (name TEXT, hash BLOB, PRIMARY KEY (name, hash)) WITHOUT ROWID",
    "INSERT INTO salt SELECT randomblob(32) WHERE NOT EXISTS (SELECT 1 FROM salt)",
    "CREATE TABLE IF NOT EXISTS passed (name TEXT, point TEXT, PRIMARY KEY (name, point)) WITHOUT ROWID",
)


class Account(NamedTuple):
    """A key, and what was asked with it. Counts are of images."""

    name: str
    budget: int | None
    """The most images that are answered; None is unlimited."""
    asked: int
    unanswered: int
    """Asked and not answered, since the server failed; they are on nobody's bill."""
    distinct: int
    """How many different images they were."""
    ends: float | None
    """When it expires, in seconds since 1970."""
    revoked: float | None

    @property
    def billed(self) -> int:
        return self.asked - self.unanswered

    @property
    def left(self) -> int | None:
        return None if self.budget is None else self.budget - self.billed

    @property
    def state(self) -> str:
        """active, revoked or expired."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.ends is not None and self.ends <= time.time() else "active"


FIELDS = "name, budget, asked, unanswered, different, ends, revoked"


class Charge(NamedTuple):
    """Images that were counted before they are answered."""

    name: str
    images: int
    new: tuple[bytes, ...]
    """Hashes of those that this account asked for the first time."""
    billed: int
    """Images of this account, these included."""
    billed_in_all: int


class Keys:
    """API keys, of which only hashes are kept, and a ledger of what was asked with each.

    A count is on the disk before an answer is computed, so that whatever happens to the server, no answer was given
    uncounted. Several processes may share the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = Database(path, TABLES, journal="WAL", otherwise="--state")

    def add(self, name: str, budget: int | None, days: float | None = None) -> str:
        """The token of a new key, which is shown this once; `SpecError` for a name that is taken or cannot be one.

        Args:
            name: of whoever gets it.
            budget: the most images that are answered; None is unlimited.
            days: after which it expires; None is never.
        """
        if not NAME.fullmatch(name) or name == ANYBODY:
            raise SpecError(f"'{name}' cannot be the name of a key: up to 64 letters, digits and . _ @ - can.")
        if any(account.name == name for account in self.accounts()):
            raise SpecError(f"There is a key '{name}' already; what it asked is on record, so take another name.")
        public, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        now = time.time()
        with self._file.transaction() as database:
            database.execute(
                "INSERT INTO accounts (name, id, hash, budget, made, ends) VALUES (?, ?, ?, ?, ?, ?)",
                (name, public, _hash(secret), budget, now, None if days is None else now + DAY * days),
            )
        return f"{public}.{secret}"

    def revoke(self, name: str) -> None:
        """End a key at once, also for a server that is running; `SpecError` if there is none of that name."""
        names = [account.name for account in self.accounts()]
        if name not in names:
            raise SpecError(unknown("key", name, names) if names else f"There are no keys in {self.path}.")
        with self._file.transaction() as database:
            database.execute("UPDATE accounts SET revoked = coalesce(revoked, ?) WHERE name = ?", (time.time(), name))

    def accounts(self, *, everybody: bool = False) -> list[Account]:
        """All keys by name; with `everybody` also those who asked without one."""
        if not self.path.exists():
            return []
        query = f"SELECT {FIELDS} FROM accounts ORDER BY name"
        with self._file.reading() as database:
            found = [Account(*row) for row in database.execute(query)]
        return [account for account in found if everybody or account.name != ANYBODY]

    def account(self, token: str | None) -> str:
        """The name of whoever has this token; `Refusal` for none, or one that no longer holds.

        Without any key in the file everybody may ask.
        """
        with self._file.reading() as database:
            if not _has_keys(database):
                return ANYBODY
            if not token:
                raise Refusal(401, NEEDED)
            public, _, secret = token.partition(".") if token.isascii() else ("", "", "")
            query = f"SELECT hash, {FIELDS} FROM accounts WHERE id = ?"
            row = database.execute(query, (public,)).fetchone()
        known, given = row[0] if row else bytes(32), _hash(secret)
        if not hmac.compare_digest(known, given) or not row:
            raise Refusal(401, "This key is not known here.")
        account = Account(*row[1:])
        if account.state != "active":
            raise Refusal(401, f"This key is {account.state}; ask for another one.")
        return account.name

    def require_left(self, name: str, count: int, most_in_all: int | None = None) -> None:
        """Raise `Refusal` where that many images would pass a budget; nothing is counted, and `charge` decides."""
        with self._file.reading() as database:
            self._require_left(database, name, count, most_in_all)

    def charge(self, name: str, images: Sequence[bytes], most_in_all: int | None = None) -> Charge:
        """Count images on the account of `name` before they are answered; on the disk when this returns.

        Raises `Refusal`, with nothing counted, where that passes the key's budget or that of all keys together.

        Args:
            name: as `account` gave it.
            images: the bytes of each image.
            most_in_all: the budget of all keys together.
        """
        hashes = {hashlib.blake2b(image, digest_size=16, key=self._salt).digest() for image in images}
        with self._file.transaction() as database:
            if name == ANYBODY:
                database.execute("INSERT OR IGNORE INTO accounts (name, made) VALUES (?, ?)", (ANYBODY, time.time()))
            billed, total = self._require_left(database, name, len(images), most_in_all)
            insert = "INSERT OR IGNORE INTO images VALUES (?, ?)"
            new = tuple(one for one in hashes if database.execute(insert, (name, one)).rowcount)
            database.execute(
                "UPDATE accounts SET asked = asked + ?, different = different + ? WHERE name = ?",
                (len(images), len(new), name),
            )
        return Charge(name, len(images), new, billed + len(images), total + len(images))

    def refund(self, charge: Charge) -> None:
        """Take images off the bill that were counted, and not answered."""
        with self._file.transaction() as database:
            database.execute(
                "UPDATE accounts SET unanswered = unanswered + ?, different = different - ? WHERE name = ?",
                (charge.images, len(charge.new), charge.name),
            )
            forgotten = [(charge.name, one) for one in charge.new]
            database.executemany("DELETE FROM images WHERE name = ? AND hash = ?", forgotten)

    def pass_by(self, name: str, point: str) -> bool:
        """Note that an account passed a point; whether that is for the first time."""
        with self._file.transaction() as database:
            return bool(database.execute("INSERT OR IGNORE INTO passed VALUES (?, ?)", (name, point)).rowcount)

    def _require_left(
        self, database: sqlite3.Connection, name: str, count: int, most_in_all: int | None
    ) -> tuple[int, int]:
        """Images billed to an account, and in all; `Refusal` where it has ended, or `count` more pass a budget."""
        row = database.execute(f"SELECT {FIELDS} FROM accounts WHERE name = ?", (name,)).fetchone()
        if name == ANYBODY and _has_keys(database):  # since this request was let in
            raise Refusal(401, NEEDED)
        account, total = (Account(*row) if row else None), self._billed_in_all(database)
        if account and account.state != "active":
            raise Refusal(401, f"This key is {account.state}; ask for another one.")
        billed = account.billed if account else 0
        _require(billed, account.budget if account else None, count, "this key")
        _require(total, most_in_all, count, "all keys together")
        return billed, total

    @property
    def billed(self) -> int:
        """Images that were answered to all keys together."""
        with self._file.reading() as database:
            return self._billed_in_all(database)

    @staticmethod
    def _billed_in_all(database: sqlite3.Connection) -> int:
        return int(database.execute("SELECT coalesce(sum(asked - unanswered), 0) FROM accounts").fetchone()[0])

    @cached_property
    def _salt(self) -> bytes:
        """A secret by which images are hashed, so that nobody can look for an image of his own among the hashes."""
        with self._file.reading() as database:
            return bytes(database.execute("SELECT value FROM salt").fetchone()[0])


def keys_of(folder: Path) -> Keys:
    """The keys of a run or an exported folder, which lie beside it; or those in a folder of keys itself."""
    if not folder.is_dir():
        raise StoreError(f"There is no folder {folder}. For a gateway that did not run yet, make it: mkdir {folder}")
    if any((folder / name).exists() for name in ("run.json", "manifest.json")):
        return Keys(beside(folder) / KEYS)
    require_state(folder)
    return Keys(folder / KEYS)


def require_state(folder: Path) -> None:
    """Raise `StoreError` for a folder that holds anything else than keys and what a gateway knows."""
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if held and not {KEYS, "gateway", "upstream"} & set(held):
        raise StoreError(
            f"{folder} is neither a run, nor an exported folder, nor one of keys: it holds {sorted(held)[0]}. Name the "
            "model, or an empty folder."
        )


def beside(folder: Path) -> Path:
    """The folder of keys and counts of a run or an exported folder: RUN-serve, next to it."""
    if not folder.is_dir():
        raise StoreError(f"There is no folder {folder}.")
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    return folder.with_name(f"{folder.name}-serve")


def _hash(secret: str) -> bytes:
    """Of a secret of 256 random bits, which nobody guesses: no slow hash is needed."""
    return hashlib.sha256(secret.encode()).digest()


def _has_keys(database: sqlite3.Connection) -> bool:
    return bool(database.execute("SELECT 1 FROM accounts WHERE name != ? LIMIT 1", (ANYBODY,)).fetchone())


def _require(billed: int, budget: int | None, count: int, whose: str) -> None:
    if budget is not None and billed + count > budget:
        left = max(budget - billed, 0)
        raise Refusal(
            403,
            f"The budget of {whose} does not suffice: {left:,} of {budget:,} images are left, and {count:,} were "
            "asked; none was answered.",
        )
