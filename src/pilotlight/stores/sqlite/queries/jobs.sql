-- name: last_seq
-- The number of the newest job.
SELECT coalesce(max(seq), 0) FROM jobs;

-- name: insert_job
-- Stores a new job without its input; nothing is inserted when the id exists.
INSERT INTO jobs (
    seq, id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, chunk_read, webhook, s3_config,
    batch_id, purges
)
VALUES (?, ?, ?, ?, ?, 'IN_QUEUE', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING;

-- name: inserted
-- Which numbers there are after a given one.
SELECT seq FROM jobs WHERE seq > ?;

-- name: insert_input
-- Stores what the client sent with a job.
INSERT INTO job_inputs (job_seq, body) VALUES (?, ?);

-- name: input
-- What the client sent with a job.
SELECT body FROM job_inputs WHERE job_seq = ?;

-- name: remembered
-- The job of an earlier submission under an idempotency key, unless it was purged.
SELECT job_records.*, idempotency.fingerprint
FROM idempotency
JOIN job_records ON job_records.seq = idempotency.job_seq
WHERE idempotency.endpoint_id = ? AND idempotency.key_id = ? AND idempotency.key = ?;

-- name: remember
-- Remembers the job of a submission under its idempotency key; that of a purged job makes room.
INSERT INTO idempotency (endpoint_id, key_id, key, fingerprint, job_seq)
VALUES (?, ?, ?, ?, ?)
ON CONFLICT (endpoint_id, key_id, key) DO UPDATE SET
    fingerprint = excluded.fingerprint,
    job_seq = excluded.job_seq;

-- name: update_job
-- Writes everything of a job that an event can change.
UPDATE jobs SET
    status = ?, queued_ms = ?, expires_ms = ?, attempt = ?, retries = ?, worker_id = ?, started_ms = ?,
    confirmed_ms = ?, first_output_ms = ?, chunk_read = ?, finished_ms = ?, output = ?, error = ?,
    s3_config = ?, attempts = ?, purges = ?
WHERE seq = ?;

-- name: touch_job
-- Writes what can change while a job runs.
UPDATE jobs SET confirmed_ms = ?, output = ? WHERE seq = ?;

-- name: finish_job
-- Writes the end of a job that ran.
UPDATE jobs SET status = ?, confirmed_ms = ?, finished_ms = ?, output = ?, error = ?, s3_config = ?
WHERE seq = ?;

-- name: take_jobs
-- Hands jobs to a worker, by their numbers (a JSON array).
UPDATE jobs SET
    status = 'IN_PROGRESS', attempt = attempt + 1, worker_id = ?, started_ms = ?, confirmed_ms = NULL,
    first_output_ms = NULL, output = NULL, error = NULL
WHERE seq IN (SELECT value FROM json_each(?));

-- name: shorten_job
-- Writes the ends of a job's time to live and retention.
UPDATE jobs SET expires_ms = ?, retention_ms = ? WHERE seq = ?;

-- name: job
-- One job by its id.
SELECT * FROM job_records WHERE id = ?;

-- name: jobs_by_id
-- Several jobs by their ids (a JSON array), in no order.
SELECT * FROM job_records WHERE id IN (SELECT value FROM json_each(?));

-- name: next_jobs
-- The jobs to hand out next, in the order of service; those whose time to live is over are passed by.
SELECT job_records.*, job_inputs.body
FROM job_records
JOIN job_inputs ON job_inputs.job_seq = job_records.seq
WHERE
    job_records.endpoint_id = ? AND job_records.purges = ? AND job_records.status = 'IN_QUEUE'
    AND job_records.expires_ms > ?
ORDER BY job_records.rank, job_records.queued_ms, job_records.seq
LIMIT ?;

-- name: newest_jobs
-- Jobs of an endpoint in one state, newest first.
SELECT * FROM job_summaries
WHERE endpoint_id = ? AND status = ?
ORDER BY created_ms DESC, id DESC
LIMIT ?;

-- name: newest_jobs_before
-- Jobs of an endpoint in one state strictly before a position, newest first.
SELECT * FROM job_summaries
WHERE endpoint_id = ?1 AND status = ?2 AND created_ms <= ?3 AND (created_ms, id) < (?3, ?4)
ORDER BY created_ms DESC, id DESC
LIMIT ?5;

-- name: running_jobs
-- All jobs handed out, in the order of their submission; the plus keeps SQLite from walking all jobs in order.
SELECT * FROM job_records WHERE status = 'IN_PROGRESS' ORDER BY +seq;

-- name: running_jobs_of_worker
-- The jobs handed out to one worker, in the order of their submission.
SELECT * FROM job_records WHERE status = 'IN_PROGRESS' AND worker_id = ? ORDER BY seq;

-- name: running_jobs_of_endpoint
-- The jobs of one endpoint that are handed out, in the order of their submission.
SELECT * FROM job_records WHERE status = 'IN_PROGRESS' AND +endpoint_id = ? ORDER BY +seq;

-- name: due_jobs
-- Living jobs whose time to live or to run is over, the longest overdue first.
SELECT * FROM job_records
WHERE finished_ms IS NULL AND deadline_ms <= ?
ORDER BY deadline_ms, seq
LIMIT ?;

-- name: queued_jobs
-- The first jobs of one class of an endpoint's queue.
SELECT * FROM job_records
WHERE endpoint_id = ? AND purges = ? AND status = 'IN_QUEUE' AND rank = ?
ORDER BY queued_ms, seq
LIMIT ?;

-- name: prune_jobs
-- Forgets ended jobs that need not be readable any more; inputs and chunks go with them.
DELETE FROM jobs WHERE seq IN (
    SELECT seq FROM jobs WHERE finished_ms IS NOT NULL AND deadline_ms <= ? ORDER BY deadline_ms, seq LIMIT ?
);

-- name: purged_jobs
-- Some of the purged jobs of an endpoint, as numbers, and whom to tell.
SELECT seq, webhook FROM jobs INDEXED BY jobs_queue WHERE endpoint_id = ? AND purges < ? AND status = 'IN_QUEUE' LIMIT ?;

-- name: purged_job
-- One purged job by its number, with its input.
SELECT
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, output, error, webhook, s3_config, batch_id, attempts, seq
FROM jobs
WHERE seq = ?;

-- name: delete_job
-- Forgets a job; its input, its chunks and what it was remembered by go with it.
DELETE FROM jobs WHERE seq = ?;

-- name: oldest_queued
-- Since when the oldest job that is not low priority waits: the first of each class, of which the oldest counts.
SELECT min(queued_ms) FROM (
    SELECT min(queued_ms) AS queued_ms FROM jobs INDEXED BY jobs_queue
    WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 0
    UNION ALL
    SELECT min(queued_ms) FROM jobs INDEXED BY jobs_queue
    WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 1
    UNION ALL
    SELECT min(queued_ms) FROM jobs INDEXED BY jobs_queue
    WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 2
    UNION ALL
    SELECT min(queued_ms) FROM jobs INDEXED BY jobs_queue
    WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 3
);

-- name: count_overdue
-- How many jobs that are not low priority were queued before a moment, counted up to a limit.
SELECT count(*) FROM (
    SELECT 1 FROM jobs INDEXED BY jobs_queue
    WHERE
        endpoint_id = ? AND purges = ? AND status = 'IN_QUEUE' AND rank IN (0, 1, 2, 3) AND queued_ms < ?
    LIMIT ?
);

-- name: count_ahead
-- How many queued jobs are before a place in the order of service, counted up to a limit.
SELECT count(*) FROM (
    SELECT 1 FROM jobs INDEXED BY jobs_queue
    WHERE
        endpoint_id = ? AND purges = ? AND status = 'IN_QUEUE' AND (rank, queued_ms, seq) < (?, ?, ?)
    LIMIT ?
);
