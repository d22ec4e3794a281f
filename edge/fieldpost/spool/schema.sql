-- The spool's tables (schema 2). A position is the place of a reading in its lane, in the order in which the gateway
-- took it: an integer from 0. One that was given to a reading that never came to the card is given again after a crash;
-- among those that did, none is used twice within a generation. `crc` is CRC-32 over everything else in a row: SQLite
-- has no checksum of its own and would hand out flipped bits.

-- One row a commit and lane: the readings at positions [first, past), the columns of codec.py in `body`. The lanes
-- lie one behind the other: place = lane << 56 | first. `count` is smaller than past - first where rows were thinned.
-- `ids` (MessagePack: node, install, boot, first, last) says who is lost when `body` is damaged. `at_ms` is the spool's
-- own clock, `since_ms` and `until_ms` the earliest and latest date.
CREATE TABLE batch (
    place    INTEGER PRIMARY KEY,
    past     INTEGER NOT NULL,
    count    INTEGER NOT NULL,
    thinned  INTEGER NOT NULL,
    at_ms    INTEGER NOT NULL,
    since_ms INTEGER NOT NULL,
    until_ms INTEGER NOT NULL,
    crc      INTEGER NOT NULL,
    ids      BLOB NOT NULL,
    body     BLOB NOT NULL
);

-- Everything small, as MessagePack under a key, together on few pages: identity marks, the routes' progress, lane
-- heads, manifests, eras of the clock. The spool's own identity is in `boot`.
CREATE TABLE state (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL,
    crc   INTEGER NOT NULL
) WITHOUT ROWID;

-- Every discard: who, which range, when, why. The same goes upstream as a record.
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

-- Readings that a far side refused for good, with its reason, until a person looks at them.
CREATE TABLE set_aside (
    id     INTEGER PRIMARY KEY,
    at_ms  INTEGER NOT NULL,
    route  TEXT NOT NULL,
    reason TEXT NOT NULL,
    body   BLOB NOT NULL,
    crc    INTEGER NOT NULL
);

-- Rows whose checksum is wrong, moved here untouched: what they were in, and all that was in them.
CREATE TABLE damaged (
    id    INTEGER PRIMARY KEY,
    what  TEXT NOT NULL,
    body  BLOB NOT NULL
);
