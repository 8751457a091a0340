-- name: insert_jobs
-- Queues new jobs in the order given and counts them; those whose id exists are left out.
WITH added AS (
    INSERT INTO jobs (
        id, endpoint_id, key_id, input, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
        execution_timeout_ms, retention_ms, attempt, retries, retries_max, webhook, s3_config, batch_id, chunk_read,
        epoch
    )
    SELECT
        new.id, new.endpoint_id, new.key_id, new.input, length(new.input), 'IN_QUEUE', new.sync, new.low_priority,
        new.created_ms, new.queued_ms, new.expires_ms, new.execution_timeout_ms, new.retention_ms, new.attempt,
        new.retries, new.retries_max, new.webhook, new.s3_config, new.batch_id, FALSE, coalesce(queues.epoch, 0)
    FROM unnest(
        $1::TEXT[], $2::TEXT[], $3::TEXT[], $4::BYTEA[], $5::BOOLEAN[], $6::BOOLEAN[], $7::BIGINT[], $8::BIGINT[],
        $9::BIGINT[], $10::BIGINT[], $11::BIGINT[], $12::INTEGER[], $13::INTEGER[], $14::INTEGER[], $15::TEXT[],
        $16::BYTEA[], $17::TEXT[]
    ) WITH ORDINALITY AS new (
        id, endpoint_id, key_id, input, sync, low_priority, created_ms, queued_ms, expires_ms, execution_timeout_ms,
        retention_ms, attempt, retries, retries_max, webhook, s3_config, batch_id, place
    )
    LEFT JOIN queues ON queues.endpoint_id = new.endpoint_id
    ORDER BY new.place
    ON CONFLICT (id) DO NOTHING
    RETURNING id, seq, endpoint_id, low_priority, input_bytes
), counted AS (
    INSERT INTO job_counters AS counters (
        endpoint_id, shard, queued, queued_low, queued_bytes, in_progress, completed, failed, retried
    )
    SELECT
        endpoint_id, pg_backend_pid() % 32, count(*) FILTER (WHERE NOT low_priority),
        count(*) FILTER (WHERE low_priority), sum(input_bytes), 0, 0, 0, 0
    FROM added
    GROUP BY endpoint_id
    ORDER BY endpoint_id
    ON CONFLICT (endpoint_id, shard) DO UPDATE SET
        queued = counters.queued + excluded.queued,
        queued_low = counters.queued_low + excluded.queued_low,
        queued_bytes = counters.queued_bytes + excluded.queued_bytes
)
SELECT id, seq FROM added;

-- name: existing_jobs
-- Which of some ids belong to jobs, purged ones included.
SELECT id FROM jobs WHERE id = ANY($1::TEXT[]);

-- name: remembered
-- The job of an earlier submission with the same idempotency key whose record lives at a moment, and what it was
-- told apart by.
SELECT job_records.*, submissions.fingerprint
FROM submissions
JOIN job_records ON job_records.seq = submissions.job_seq
WHERE submissions.endpoint_id = $1 AND submissions.key_id = $2 AND submissions.idempotency_key = $3
    AND (job_records.finished_ms IS NULL OR job_records.deadline_ms > $4);

-- name: forget_submission
-- Makes room where the job of an earlier submission has been purged, or its record has ended. A statement of its
-- own: within `remember` it would judge by a snapshot that is older than the submission which that has waited for.
DELETE FROM submissions
WHERE endpoint_id = $1 AND key_id = $2 AND idempotency_key = $3
    AND NOT EXISTS (
        SELECT 1 FROM job_records
        WHERE job_records.seq = submissions.job_seq
            AND (job_records.finished_ms IS NULL OR job_records.deadline_ms > $4)
    );

-- name: remember
-- Remembers a submission; no row when another one is remembered.
INSERT INTO submissions (endpoint_id, key_id, idempotency_key, fingerprint, job_seq)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (endpoint_id, key_id, idempotency_key) DO NOTHING;

-- name: next_jobs
-- Locks the jobs to hand out next, in the order of service; what others have locked is passed by, as is what has
-- no time left to live.
SELECT
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, output, error, webhook, s3_config, batch_id, attempts, seq, input,
    writer
FROM jobs
WHERE endpoint_id = $1
    AND status = 'IN_QUEUE'
    AND epoch = coalesce((SELECT queues.epoch FROM queues WHERE queues.endpoint_id = $1), 0)
    AND expires_ms > $2
    AND id <> ALL($4::TEXT[])
ORDER BY rank, place, seq
LIMIT $3
FOR UPDATE SKIP LOCKED;

-- name: lock_jobs
-- Locks jobs by their ids, in the order of the ids.
SELECT * FROM job_records WHERE id = ANY($1::TEXT[]) ORDER BY id FOR UPDATE;

-- name: write_jobs
-- Writes everything of some locked jobs that can change, and adds to the counters of their endpoints; jobs queued
-- again forget their chunks.
WITH counted AS (
    INSERT INTO job_counters AS counters (
        endpoint_id, shard, queued, queued_low, queued_bytes, in_progress, completed, failed, retried
    )
    SELECT
        endpoint_id, pg_backend_pid() % 32, queued, queued_low, queued_bytes, in_progress, completed, failed, retried
    FROM unnest(
        $19::TEXT[], $20::BIGINT[], $21::BIGINT[], $22::BIGINT[], $23::BIGINT[], $24::BIGINT[], $25::BIGINT[],
        $26::BIGINT[]
    ) AS change (endpoint_id, queued, queued_low, queued_bytes, in_progress, completed, failed, retried)
    ORDER BY endpoint_id
    ON CONFLICT (endpoint_id, shard) DO UPDATE SET
        queued = counters.queued + excluded.queued,
        queued_low = counters.queued_low + excluded.queued_low,
        queued_bytes = counters.queued_bytes + excluded.queued_bytes,
        in_progress = counters.in_progress + excluded.in_progress,
        completed = counters.completed + excluded.completed,
        failed = counters.failed + excluded.failed,
        retried = counters.retried + excluded.retried
)
UPDATE jobs SET
    status = new.status,
    queued_ms = new.queued_ms,
    expires_ms = new.expires_ms,
    retention_ms = new.retention_ms,
    attempt = new.attempt,
    retries = new.retries,
    worker_id = new.worker_id,
    started_ms = new.started_ms,
    confirmed_ms = new.confirmed_ms,
    first_output_ms = new.first_output_ms,
    chunk_read = new.chunk_read,
    finished_ms = new.finished_ms,
    output = new.output,
    error = new.error,
    s3_config = new.s3_config,
    attempts = new.attempts,
    writer = $27,
    chunks_read = CASE WHEN new.requeued THEN jobs.chunks ELSE jobs.chunks_read END,
    unread_bytes = CASE WHEN new.requeued THEN 0 ELSE jobs.unread_bytes END,
    epoch = coalesce((SELECT queues.epoch FROM queues WHERE queues.endpoint_id = jobs.endpoint_id), 0)
FROM unnest(
    $1::BIGINT[], $2::TEXT[], $3::BIGINT[], $4::BIGINT[], $5::BIGINT[], $6::INTEGER[], $7::INTEGER[], $8::TEXT[],
    $9::BIGINT[], $10::BIGINT[], $11::BIGINT[], $12::BOOLEAN[], $13::BIGINT[], $14::BYTEA[], $15::TEXT[],
    $16::BYTEA[], $17::TEXT[], $18::BOOLEAN[]
) AS new (
    seq, status, queued_ms, expires_ms, retention_ms, attempt, retries, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, output, error, s3_config, attempts, requeued
)
WHERE jobs.seq = new.seq;

-- name: delete_chunks
-- Forgets the chunks of some jobs.
DELETE FROM job_chunks WHERE job_seq = ANY($1::BIGINT[]);

-- name: inputs
-- What the client sent with some jobs.
SELECT seq, input FROM jobs WHERE seq = ANY($1::BIGINT[]);

-- name: job
-- One job by its id.
SELECT * FROM job_records WHERE id = $1;

-- name: writers
-- Which transactions last changed some jobs.
SELECT seq, writer FROM jobs WHERE seq = ANY($1::BIGINT[]);

-- name: jobs_newest
-- Jobs of an endpoint, newest first.
SELECT * FROM job_heads WHERE endpoint_id = $1 ORDER BY created_ms DESC, id DESC LIMIT $2;

-- name: jobs_newest_before
-- Jobs of an endpoint strictly before a position, newest first.
SELECT * FROM job_heads
WHERE endpoint_id = $1 AND (created_ms, id) < ($3, $4)
ORDER BY created_ms DESC, id DESC
LIMIT $2;

-- name: jobs_newest_by_status
-- Jobs of an endpoint in one state, newest first.
SELECT * FROM job_heads
WHERE endpoint_id = $1 AND status = $3
ORDER BY created_ms DESC, id DESC
LIMIT $2;

-- name: jobs_newest_by_status_before
-- Jobs of an endpoint in one state strictly before a position, newest first.
SELECT * FROM job_heads
WHERE endpoint_id = $1 AND status = $3 AND (created_ms, id) < ($4, $5)
ORDER BY created_ms DESC, id DESC
LIMIT $2;

-- name: running_jobs
-- All jobs handed out, in the order of their submission.
SELECT * FROM job_records WHERE status = 'IN_PROGRESS' ORDER BY seq;

-- name: running_jobs_of_worker
-- The jobs handed out to one worker, in the order of their submission.
SELECT * FROM job_records WHERE status = 'IN_PROGRESS' AND worker_id = $1 ORDER BY seq;

-- name: due_jobs
-- Living jobs whose time to live or to run is over, the longest overdue first.
SELECT * FROM job_records
WHERE finished_ms IS NULL AND deadline_ms <= $1
ORDER BY deadline_ms, seq
LIMIT $2;

-- name: living_jobs
-- Ids of jobs of an endpoint that have not ended, oldest first.
SELECT id FROM job_records WHERE endpoint_id = $1 AND finished_ms IS NULL ORDER BY created_ms, seq LIMIT $2;

-- name: prune_jobs
-- Forgets ended jobs that need not be readable any more; chunks and idempotency keys go with them.
DELETE FROM jobs WHERE seq IN (
    SELECT seq FROM jobs
    WHERE finished_ms IS NOT NULL AND deadline_ms <= $1
    ORDER BY deadline_ms, seq
    LIMIT $2
    FOR UPDATE SKIP LOCKED
);

-- name: place
-- What tells where in the queue a job stands.
SELECT job_records.endpoint_id, job_records.status, job_records.epoch, job_records.rank, jobs.place, jobs.seq
FROM job_records
JOIN jobs ON jobs.seq = job_records.seq
WHERE job_records.id = $1;

-- name: count_ahead
-- How many jobs of the queue are to be served before a place, counted up to a limit.
SELECT count(*) FROM (
    SELECT 1 FROM jobs
    WHERE endpoint_id = $1 AND status = 'IN_QUEUE' AND epoch = $2 AND (rank, place, seq) < ($3, $4, $5)
    LIMIT $6
) AS ahead;
