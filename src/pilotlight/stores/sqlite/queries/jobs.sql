-- name: insert_job
-- Stores a new job without its input; nothing is inserted when the id exists.
INSERT INTO jobs (
    id, endpoint_id, key_id, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, worker_id, started_ms, confirmed, chunk_read,
    finished_ms, output, error
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING;

-- name: insert_job_input
-- Stores what the client sent with a job.
INSERT INTO job_inputs (job_seq, body) VALUES (?, ?);

-- name: update_job
-- Writes everything of a job that can change.
UPDATE jobs SET
    status = ?, queued_ms = ?, expires_ms = ?, retention_ms = ?, attempt = ?, retries = ?, worker_id = ?,
    started_ms = ?, confirmed = ?, chunk_read = ?, finished_ms = ?, output = ?, error = ?
WHERE seq = ?;

-- name: job
-- One job by its id.
SELECT * FROM job_records WHERE id = ?;

-- name: next_jobs
-- The jobs to hand out next, in the order of service; those whose time to live is over are passed by.
SELECT * FROM job_records
WHERE endpoint_id = ? AND status = 'IN_QUEUE' AND expires_ms > ?
ORDER BY rank, queued_ms, seq
LIMIT ?;

-- name: jobs_newest
-- Jobs of an endpoint, newest first.
SELECT * FROM job_records WHERE endpoint_id = ? ORDER BY created_ms DESC, id DESC LIMIT ?;

-- name: jobs_newest_before
-- Jobs of an endpoint strictly before a position, newest first.
SELECT * FROM job_records
WHERE endpoint_id = ? AND (created_ms, id) < (?, ?)
ORDER BY created_ms DESC, id DESC
LIMIT ?;

-- name: jobs_newest_by_status
-- Jobs of an endpoint in one state, newest first.
SELECT * FROM job_records WHERE endpoint_id = ? AND status = ? ORDER BY created_ms DESC, id DESC LIMIT ?;

-- name: jobs_newest_by_status_before
-- Jobs of an endpoint in one state strictly before a position, newest first.
SELECT * FROM job_records
WHERE endpoint_id = ? AND status = ? AND (created_ms, id) < (?, ?)
ORDER BY created_ms DESC, id DESC
LIMIT ?;

-- name: running_jobs
-- All jobs handed out, in the order of their submission; the plus keeps SQLite from walking all jobs in order.
SELECT * FROM job_records WHERE status = 'IN_PROGRESS' ORDER BY +seq;

-- name: running_jobs_of_worker
-- The jobs handed out to one worker, in the order of their submission.
SELECT * FROM job_records WHERE status = 'IN_PROGRESS' AND worker_id = ? ORDER BY seq;

-- name: due_jobs
-- Living jobs whose time to live or to run is over, the longest overdue first.
SELECT * FROM job_records
WHERE finished_ms IS NULL AND deadline_ms <= ?
ORDER BY deadline_ms, seq
LIMIT ?;

-- name: living_jobs
-- The next jobs of an endpoint that have not ended, oldest first, strictly after a position.
SELECT * FROM job_records
WHERE endpoint_id = ? AND (created_ms, id) > (?, ?) AND finished_ms IS NULL
ORDER BY created_ms, id
LIMIT ?;

-- name: prune_jobs
-- Forgets ended jobs that need not be readable any more; inputs and chunks go with them.
DELETE FROM jobs WHERE seq IN (
    SELECT seq FROM jobs WHERE finished_ms IS NOT NULL AND deadline_ms <= ? ORDER BY deadline_ms, seq LIMIT ?
);

-- name: oldest_queued
-- Since when the oldest normal job waits: the first of each normal class, of which the older counts.
SELECT min(queued_ms) FROM (
    SELECT min(queued_ms) AS queued_ms FROM jobs WHERE endpoint_id = ?1 AND status = 'IN_QUEUE' AND rank = 0
    UNION ALL
    SELECT min(queued_ms) FROM jobs WHERE endpoint_id = ?1 AND status = 'IN_QUEUE' AND rank = 1
);

-- name: count_overdue
-- How many normal jobs were queued before a moment, counted up to a limit.
SELECT count(*) FROM (
    SELECT 1 FROM jobs
    WHERE endpoint_id = ? AND status = 'IN_QUEUE' AND rank IN (0, 1) AND queued_ms < ?
    LIMIT ?
);
