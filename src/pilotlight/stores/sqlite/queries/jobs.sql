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
-- Which numbers there are from a given one on.
SELECT seq FROM jobs WHERE seq >= ?;

-- name: insert_input
-- Stores what the client sent with a job.
INSERT INTO job_inputs (job_seq, body) VALUES (?, ?);

-- name: inputs
-- What the clients sent with jobs, by their numbers (a JSON array).
SELECT job_seq, body FROM job_inputs WHERE job_seq IN (SELECT value FROM json_each(?));

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
-- Remembers the job of a submission under its idempotency key; that of a purged or forgotten job makes room.
INSERT INTO idempotency (endpoint_id, key_id, key, fingerprint, job_seq)
VALUES (?, ?, ?, ?, ?)
ON CONFLICT (endpoint_id, key_id, key) DO UPDATE SET
    fingerprint = excluded.fingerprint,
    job_seq = excluded.job_seq;

-- name: update_job
-- Writes everything of a job that an event can change.
UPDATE jobs SET
    status = new.column1, queued_ms = new.column2, expires_ms = new.column3, attempt = new.column4,
    retries = new.column5, worker_id = new.column6, started_ms = new.column7, confirmed_ms = new.column8,
    first_output_ms = new.column9, chunk_read = new.column10, finished_ms = new.column11,
    output = new.column12, error = new.column13, s3_config = new.column14, attempts = new.column15,
    purges = new.column16
FROM (VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)) AS new
WHERE jobs.seq = new.column17;

-- name: touch_job
-- Writes what can change while a job runs.
UPDATE jobs SET confirmed_ms = new.column1, output = new.column2
FROM (VALUES (?, ?, ?)) AS new
WHERE jobs.seq = new.column3;

-- name: finish_job
-- Writes the end of a job that ran.
UPDATE jobs SET
    status = new.column1, confirmed_ms = new.column2, finished_ms = new.column3, output = new.column4,
    error = new.column5, s3_config = new.column6
FROM (VALUES (?, ?, ?, ?, ?, ?, ?)) AS new
WHERE jobs.seq = new.column7;

-- name: take_job
-- Hands a job to a worker.
UPDATE jobs SET
    status = 'IN_PROGRESS', attempt = attempt + 1, worker_id = new.column1, started_ms = new.column2,
    confirmed_ms = NULL, first_output_ms = NULL, output = NULL, error = NULL
FROM (VALUES (?, ?, ?)) AS new
WHERE jobs.seq = new.column3;

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
-- The ids of the jobs to hand out next, in the order of service, a JSON array: with its limit the inner query
-- runs as it stands, in its order. Those whose time to live is over are passed by.
SELECT json_group_array(id) FROM (
    SELECT id FROM jobs
    WHERE endpoint_id = ? AND purges = ? AND status = 'IN_QUEUE' AND expires_ms > ?
    ORDER BY rank, place, seq
    LIMIT ?
);

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
SELECT job_records.*
FROM jobs
CROSS JOIN job_records ON job_records.seq = jobs.seq
WHERE jobs.endpoint_id = ? AND jobs.purges = ? AND jobs.status = 'IN_QUEUE' AND jobs.rank = ?
ORDER BY jobs.place, jobs.seq
LIMIT ?;

-- name: old_jobs
-- Ended jobs that need not be readable any more: their numbers and their ids, two JSON arrays.
SELECT json_group_array(seq), json_group_array(id) FROM (
    SELECT seq, id FROM jobs WHERE finished_ms IS NOT NULL AND deadline_ms <= ? ORDER BY deadline_ms, seq LIMIT ?
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

-- name: delete_jobs
-- Forgets jobs, by their numbers (a JSON array); inputs, chunks and what they were remembered by go with them.
DELETE FROM jobs WHERE seq IN (SELECT value FROM json_each(?));

-- name: queue_age
-- Of the jobs that are not low priority: since when the oldest waits, and how many were queued before a moment. Of
-- each class only the first are looked at, up to a limit: the others have waited less, but for jumps of the clock.
SELECT min(queued_ms), min(coalesce(sum(queued_ms < ?3), 0), ?4) FROM (
    SELECT * FROM (
        SELECT queued_ms FROM jobs INDEXED BY jobs_queue
        WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 0
        ORDER BY place, seq
        LIMIT ?4
    )
    UNION ALL
    SELECT * FROM (
        SELECT queued_ms FROM jobs INDEXED BY jobs_queue
        WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 1
        ORDER BY place, seq
        LIMIT ?4
    )
    UNION ALL
    SELECT * FROM (
        SELECT queued_ms FROM jobs INDEXED BY jobs_queue
        WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 2
        ORDER BY place, seq
        LIMIT ?4
    )
    UNION ALL
    SELECT * FROM (
        SELECT queued_ms FROM jobs INDEXED BY jobs_queue
        WHERE endpoint_id = ?1 AND purges = ?2 AND status = 'IN_QUEUE' AND rank = 3
        ORDER BY place, seq
        LIMIT ?4
    )
);

-- name: count_ahead
-- How many queued jobs are before a place in the order of service, counted up to a limit.
SELECT count(*) FROM (
    SELECT 1 FROM jobs INDEXED BY jobs_queue
    WHERE
        endpoint_id = ? AND purges = ? AND status = 'IN_QUEUE' AND (rank, place, seq) < (?, ?, ?)
    LIMIT ?
);
