-- name: change_counters
-- Adds to the counters of one endpoint; the first change of an endpoint makes its row.
INSERT INTO job_counters (
    endpoint_id, queued, queued_low, queued_bytes, in_progress, completed, failed, retried
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (endpoint_id) DO UPDATE SET
    queued = queued + excluded.queued,
    queued_low = queued_low + excluded.queued_low,
    queued_bytes = queued_bytes + excluded.queued_bytes,
    in_progress = in_progress + excluded.in_progress,
    completed = completed + excluded.completed,
    failed = failed + excluded.failed,
    retried = retried + excluded.retried;

-- name: counters
-- All counters of one endpoint.
SELECT queued, queued_low, queued_bytes, in_progress, completed, failed, retried, purges
FROM job_counters
WHERE endpoint_id = ?;

-- name: purges
-- How often the queue of an endpoint was purged.
SELECT purges FROM job_counters WHERE endpoint_id = ?;

-- name: purge_counters
-- Counts one more purge of a queue, and nothing in it any more.
UPDATE job_counters SET purges = purges + 1, queued = 0, queued_low = 0, queued_bytes = 0 WHERE endpoint_id = ?;

-- name: purged_queues
-- The endpoints whose queue was ever purged.
SELECT endpoint_id, purges FROM job_counters WHERE purges > 0;
