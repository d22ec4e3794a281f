-- The spool's statements, each under its name; log.py says when they run and why.

-- name: add_batch
INSERT INTO batch (first, past, crc, body) VALUES (?, ?, ?, ?);

-- name: read_batches
-- From the batch that holds a position on.
SELECT first, past, crc, body FROM batch
WHERE first >= coalesce((SELECT max(first) FROM batch WHERE first <= ?1), 0) AND past > ?1
ORDER BY first LIMIT ?2;

-- name: move_damaged
INSERT OR REPLACE INTO damaged SELECT first, past, crc, body FROM batch WHERE first = ?;

-- name: delete_batch
DELETE FROM batch WHERE first = ?;

-- name: prune
-- Behind the slowest route.
DELETE FROM batch WHERE first < ?1 AND past <= ?1;

-- name: bounds
SELECT coalesce(min(first), 0), coalesce(max(past), 0) FROM batch;

-- name: save_mark
INSERT INTO mark (node, install, boot, upto, beyond) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (node, install, boot) DO UPDATE SET upto = excluded.upto, beyond = excluded.beyond;

-- name: delete_mark
DELETE FROM mark WHERE node = ? AND install = ? AND boot = ?;

-- name: load_marks
SELECT node, install, boot, upto, beyond FROM mark ORDER BY node, boot;

-- name: save_route
INSERT INTO route (id, cursor) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET cursor = excluded.cursor;

-- name: load_routes
SELECT id, cursor FROM route;

-- name: add_to_ledger
INSERT INTO ledger (at_ms, node, install, boot, first, last, why) VALUES (?, ?, ?, ?, ?, ?, ?);

-- name: read_ledger
SELECT at_ms, node, install, boot, first, last, why FROM ledger ORDER BY id DESC LIMIT ?;

-- name: count_ledger
SELECT why, count(*) FROM ledger GROUP BY why;

-- name: save_manifest
INSERT OR IGNORE INTO manifest (hash, body) VALUES (?, ?);

-- name: load_manifests
SELECT body FROM manifest;

-- name: add_set_aside
INSERT INTO set_aside (at_ms, route, reason, body) VALUES (?, ?, ?, ?);

-- name: count_set_aside
SELECT count(*) FROM set_aside;

-- name: save_meta
INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value;

-- name: load_meta
SELECT key, value FROM meta;
