-- The spool's tables. A position is the place of a reading in the order in which the gateway took it: an integer
-- from 0 that is never used twice within a generation.

-- One row a commit: the readings at positions [first, past) in one zlib'd MessagePack body. `crc` is CRC-32 over
-- the body: SQLite has no checksum of its own and would hand out flipped bits.
CREATE TABLE batch (
    first INTEGER PRIMARY KEY,
    past  INTEGER NOT NULL,
    crc   INTEGER NOT NULL,
    body  BLOB NOT NULL
);

-- Which rows of a boot have been taken: 0..upto, and the ranges in `beyond` (JSON).
CREATE TABLE mark (
    node    TEXT NOT NULL,
    install TEXT NOT NULL,
    boot    INTEGER NOT NULL,
    upto    INTEGER NOT NULL,
    beyond  TEXT NOT NULL,
    PRIMARY KEY (node, install, boot)
) WITHOUT ROWID;

-- How far each route has got: everything before `cursor` was confirmed by its uplink.
CREATE TABLE route (
    id     TEXT PRIMARY KEY,
    cursor INTEGER NOT NULL
) WITHOUT ROWID;

-- Every discard and gap: who, which range, when, why. The same goes upstream as a gap record.
CREATE TABLE ledger (
    id      INTEGER PRIMARY KEY,
    at_ms   INTEGER NOT NULL,
    node    TEXT NOT NULL,
    install TEXT NOT NULL,
    boot    INTEGER NOT NULL,
    first   INTEGER NOT NULL,
    last    INTEGER,
    why     TEXT NOT NULL
);

-- What the columns of readings mean, for as long as readings may name them.
CREATE TABLE manifest (
    hash TEXT PRIMARY KEY,
    body BLOB NOT NULL
) WITHOUT ROWID;

-- Readings that a far side refused for good, with its reason, until a person looks at them.
CREATE TABLE set_aside (
    id     INTEGER PRIMARY KEY,
    at_ms  INTEGER NOT NULL,
    route  TEXT NOT NULL,
    reason TEXT NOT NULL,
    body   BLOB NOT NULL
);

-- Bodies whose checksum is wrong, moved here untouched.
CREATE TABLE damaged (
    first INTEGER PRIMARY KEY,
    past  INTEGER NOT NULL,
    crc   INTEGER NOT NULL,
    body  BLOB NOT NULL
);

-- `generation`: 12 hex digits, new with each new spool; `boot`: how often it was opened.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
