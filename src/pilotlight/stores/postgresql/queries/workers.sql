-- name: put_worker
-- Inserts or replaces the record of one worker.
INSERT INTO workers (
    id, endpoint_id, version, state, stage, key_hash, devices, memory_bytes, process, failure, created_ms,
    ready_ms, state_ms, ended_ms
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
ON CONFLICT (id) DO UPDATE SET
    endpoint_id = excluded.endpoint_id,
    version = excluded.version,
    state = excluded.state,
    stage = excluded.stage,
    key_hash = excluded.key_hash,
    devices = excluded.devices,
    memory_bytes = excluded.memory_bytes,
    process = excluded.process,
    failure = excluded.failure,
    created_ms = excluded.created_ms,
    ready_ms = excluded.ready_ms,
    state_ms = excluded.state_ms,
    ended_ms = excluded.ended_ms;

-- name: worker
-- One worker, living or ended.
SELECT
    id, endpoint_id, version, state, stage, key_hash, devices, memory_bytes, process, failure, created_ms,
    ready_ms, state_ms, ended_ms
FROM workers
WHERE id = $1;

-- name: workers
-- Workers oldest first, of one endpoint or (without an id) of all, with or without ended ones.
SELECT
    id, endpoint_id, version, state, stage, key_hash, devices, memory_bytes, process, failure, created_ms,
    ready_ms, state_ms, ended_ms
FROM workers
WHERE ($1::TEXT IS NULL OR endpoint_id = $1) AND (NOT $2::BOOLEAN OR state NOT IN ('stopped', 'failed'))
ORDER BY created_ms, seq;

-- name: prune_workers
-- Forgets workers that ended before a moment.
DELETE FROM workers WHERE ended_ms < $1;
