"""The SQLite database of a spool: how it is opened and made, and the statements that it knows.

One connection writes and checkpoints: in SQLite before 3.51.3 a write-ahead log that two connections reset can lose a
commit.
"""

from __future__ import annotations

import sqlite3
from importlib.resources import files
from pathlib import Path

from .folder import sync
from .rows import crc_of_state

SCHEMA = 2
PAGE_BYTES = 1024
"""A commit rewrites whole pages, so small ones spare the card; tests/bench/ has the figures for others."""

CHECKPOINT_PAGES = 250
"""A log that grows makes the file system write its journal at every commit, 12 to 24 kB; one that begins anew at a
quarter of a megabyte is soon as large as it gets."""


def connect(path: Path) -> sqlite3.Connection:
    """The one connection, made so that what it commits is on the disk."""
    db = sqlite3.connect(path, isolation_level=None, timeout=5, cached_statements=64)
    try:
        db.text_factory = lambda text: text.decode("utf-8", "replace")
        # First of all: no shared-memory file, which the kernel would write to the card, and a full one has no room for.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        if not db.execute("PRAGMA page_count").fetchone()[0]:
            # These count only before the first table is made; later the second one would write at each opening.
            db.execute(f"PRAGMA page_size={PAGE_BYTES}")
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":  # it failed, and SQLite says so only in this way
            raise sqlite3.OperationalError("no write-ahead log can be made")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        db.execute("PRAGMA cell_size_check=ON")
        db.execute("PRAGMA user_version").fetchone()
        sync(path.parent)  # SQLite does so too for its log's name, and goes on where it fails
    except BaseException:
        db.close()
        raise
    return db


def create(db: sqlite3.Connection) -> None:
    """Make the tables."""
    schema = files(__package__).joinpath("schema.sql").read_text()
    db.executescript(f"BEGIN; {schema} PRAGMA user_version={SCHEMA}; COMMIT;")


def statements() -> dict[str, str]:
    """The named statements of statements.sql."""
    text = files(__package__).joinpath("statements.sql").read_text()
    parts = text.split("-- name: ")[1:]
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}


def write_state(db: sqlite3.Connection, sql: dict[str, str], state: dict[str, bytes | None]) -> None:
    """Put down entries of the table `state`, or delete them."""
    for key, value in state.items():
        if value is None:
            db.execute(sql["delete_state"], (key,))
        else:
            db.execute(sql["save_state"], (key, value, crc_of_state(key, value)))


def about(version: int) -> str:
    """What is wrong with a schema that is not ours."""
    if version == 0:
        return "has tables, and no schema's number: it is another program's, or damaged"
    later = ": readings that only a newer one can read stay in the file set aside" if version > SCHEMA else ""
    return f"has schema {version}, this Fieldpost writes schema {SCHEMA}{later}"
