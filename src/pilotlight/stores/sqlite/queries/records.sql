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

-- name: insert_request
-- Appends one request; one that is there already is skipped.
INSERT INTO requests (
    id, road, endpoint_id, key_id, worker_id, route, status, outcome, arrival_ms, wait_ms, first_token_ms,
    duration_ms, tokens_in, tokens_out, estimated
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING;

-- name: requests
-- The newest requests of all endpoints.
SELECT
    id, road, endpoint_id, key_id, worker_id, route, status, outcome, arrival_ms, wait_ms, first_token_ms,
    duration_ms, tokens_in, tokens_out, estimated
FROM requests
ORDER BY arrival_ms DESC, seq DESC
LIMIT ?;

-- name: requests_of_endpoint
-- The newest requests of one endpoint.
SELECT
    id, road, endpoint_id, key_id, worker_id, route, status, outcome, arrival_ms, wait_ms, first_token_ms,
    duration_ms, tokens_in, tokens_out, estimated
FROM requests
WHERE endpoint_id = ?
ORDER BY arrival_ms DESC, seq DESC
LIMIT ?;

-- name: prune_requests
-- Forgets all but the newest requests.
DELETE FROM requests WHERE seq IN (
    SELECT seq FROM requests ORDER BY arrival_ms DESC, seq DESC LIMIT -1 OFFSET ?
);

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
