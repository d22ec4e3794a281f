-- The spool's statements, each under its name; log.py says when they run and why.

-- name: add_batch
-- OR REPLACE: what lies at a place that is given again was never acknowledged, or was thinned just now.
INSERT OR REPLACE INTO batch (place, past, count, thinned, at_ms, since_ms, until_ms, crc, ids, body)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: read_batches
-- From the batch that begins at a position or before it on, within one lane.
SELECT place, past, count, thinned, at_ms, since_ms, until_ms, crc, ids, body FROM batch
WHERE place >= coalesce((SELECT max(place) FROM batch WHERE place BETWEEN ?1 AND ?2), ?1) AND place < ?3
ORDER BY place LIMIT ?4;

-- name: list_batches
-- The same without their bodies, from a place on.
SELECT place, past, count, thinned, at_ms, since_ms, until_ms, length(body) FROM batch
WHERE place >= ? AND place < ? ORDER BY place LIMIT ?;

-- name: delete_batch
DELETE FROM batch WHERE place = ?;

-- name: prunable_batches
-- Some batches from a place on, to see whether anybody wants them.
SELECT place, past, at_ms FROM batch WHERE place >= ? AND place < ? ORDER BY place LIMIT ?;

-- name: bounds
-- First and last place in use of a lane.
SELECT min(place), max(place) FROM batch WHERE place >= ? AND place < ?;

-- name: list_ids
-- Who is in the batches.
SELECT ids FROM batch;

-- name: save_state
INSERT INTO state (key, value, crc) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET value = excluded.value, crc = excluded.crc;

-- name: delete_state
DELETE FROM state WHERE key = ?;

-- name: load_state
SELECT key, value, crc FROM state;

-- name: add_to_ledger
INSERT INTO ledger (at_ms, node, install, boot, first, last, why) VALUES (?, ?, ?, ?, ?, ?, ?);

-- name: read_ledger
SELECT at_ms, node, install, boot, first, last, why FROM ledger ORDER BY id DESC LIMIT ?;

-- name: trim_ledger
DELETE FROM ledger WHERE id <= (SELECT max(id) FROM ledger) - ?;

-- name: count_ledger
-- By the word before the colon.
SELECT CASE WHEN instr(why, ':') THEN substr(why, 1, instr(why, ':') - 1) ELSE why END AS word, count(*)
FROM ledger GROUP BY word;

-- name: add_set_aside
INSERT INTO set_aside (at_ms, route, reason, body, crc) VALUES (?, ?, ?, ?, ?);

-- name: read_set_aside
SELECT id, at_ms, route, reason, body, crc FROM set_aside ORDER BY id;

-- name: delete_set_aside
DELETE FROM set_aside WHERE id = ?;

-- name: count_set_aside
SELECT count(*) FROM set_aside;

-- name: add_damaged
INSERT INTO damaged (what, body) VALUES (?, ?);

-- name: count_damaged
SELECT count(*) FROM damaged;
