-- name: insert_usage
-- Appends an interval; one that is there already is skipped.
INSERT INTO usage_intervals (worker_id, sequence, endpoint_id, version, state, devices, start_ms, end_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING;

-- name: usage
-- Intervals that end after a moment, of all endpoints.
SELECT worker_id, sequence, endpoint_id, version, state, devices, start_ms, end_ms
FROM usage_intervals
WHERE end_ms > ?
ORDER BY start_ms, worker_id, sequence;

-- name: usage_of_endpoint
-- Intervals of one endpoint that end after a moment.
SELECT worker_id, sequence, endpoint_id, version, state, devices, start_ms, end_ms
FROM usage_intervals
WHERE end_ms > ? AND endpoint_id = ?
ORDER BY start_ms, worker_id, sequence;

-- name: usage_of_worker
-- Intervals of one worker that end after a moment.
SELECT worker_id, sequence, endpoint_id, version, state, devices, start_ms, end_ms
FROM usage_intervals
WHERE end_ms > ? AND worker_id = ?
ORDER BY start_ms, worker_id, sequence;

-- name: put_start
-- Inserts or replaces the record of one start.
INSERT INTO starts (
    worker_id, endpoint_id, version, rung, stages, outcome, memory_bytes, note, failure, decided_ms
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (worker_id, decided_ms) DO UPDATE SET
    endpoint_id = excluded.endpoint_id,
    version = excluded.version,
    rung = excluded.rung,
    stages = excluded.stages,
    outcome = excluded.outcome,
    memory_bytes = excluded.memory_bytes,
    note = excluded.note,
    failure = excluded.failure;

-- name: prune_starts
-- Forgets starts that are more than a number of insertions old.
DELETE FROM starts WHERE seq <= (SELECT max(seq) FROM starts) - ?;

-- name: starts
-- The newest starts of all endpoints.
SELECT worker_id, endpoint_id, version, rung, stages, outcome, memory_bytes, note, failure
FROM starts
ORDER BY decided_ms DESC, seq DESC
LIMIT ?;

-- name: starts_of_endpoint
-- The newest starts of one endpoint.
SELECT worker_id, endpoint_id, version, rung, stages, outcome, memory_bytes, note, failure
FROM starts
WHERE endpoint_id = ?
ORDER BY decided_ms DESC, seq DESC
LIMIT ?;
