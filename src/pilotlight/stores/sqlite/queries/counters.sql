-- name: change_counters
-- Adds to the counters of one endpoint; the first change of an endpoint makes its row.
INSERT INTO job_counters (endpoint_id, queued, queued_low, in_progress, completed, failed, retried)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (endpoint_id) DO UPDATE SET
    queued = queued + excluded.queued,
    queued_low = queued_low + excluded.queued_low,
    in_progress = in_progress + excluded.in_progress,
    completed = completed + excluded.completed,
    failed = failed + excluded.failed,
    retried = retried + excluded.retried;

-- name: counters
-- All counters of one endpoint.
SELECT queued, queued_low, in_progress, completed, failed, retried FROM job_counters WHERE endpoint_id = ?;
