-- name: uncount_queued
-- Takes what is queued out of the counters of an endpoint.
INSERT INTO job_counters AS counters (
    endpoint_id, shard, queued, queued_low, queued_bytes, in_progress, completed, failed, retried
)
VALUES ($1, pg_backend_pid() % 32, -$2::BIGINT, -$3::BIGINT, -$4::BIGINT, 0, 0, 0, 0)
ON CONFLICT (endpoint_id, shard) DO UPDATE SET
    queued = counters.queued + excluded.queued,
    queued_low = counters.queued_low + excluded.queued_low,
    queued_bytes = counters.queued_bytes + excluded.queued_bytes;

-- name: change_batch_counters
-- Adds to the counters of some batches; those that have been forgotten are left out.
INSERT INTO batch_counters AS counters (batch_id, shard, queued, in_progress, completed, failed, cancelled)
SELECT new.batch_id, pg_backend_pid() % 32, queued, in_progress, completed, failed, cancelled
FROM unnest($1::TEXT[], $2::BIGINT[], $3::BIGINT[], $4::BIGINT[], $5::BIGINT[], $6::BIGINT[])
    AS new (batch_id, queued, in_progress, completed, failed, cancelled)
WHERE EXISTS (SELECT 1 FROM batches WHERE batches.id = new.batch_id)
ORDER BY new.batch_id
ON CONFLICT (batch_id, shard) DO UPDATE SET
    queued = counters.queued + excluded.queued,
    in_progress = counters.in_progress + excluded.in_progress,
    completed = counters.completed + excluded.completed,
    failed = counters.failed + excluded.failed,
    cancelled = counters.cancelled + excluded.cancelled;

-- name: counts
-- The counters of one endpoint.
SELECT
    coalesce(sum(queued + queued_low), 0)::BIGINT AS queued,
    coalesce(sum(in_progress), 0)::BIGINT AS in_progress,
    coalesce(sum(completed), 0)::BIGINT AS completed,
    coalesce(sum(failed), 0)::BIGINT AS failed,
    coalesce(sum(retried), 0)::BIGINT AS retried
FROM job_counters
WHERE endpoint_id = $1;

-- name: demand
-- The queue of one endpoint for the scaler: counters, since when the oldest normal job waits, and how many of those
-- were queued before a moment. Of each normal class only the first are looked at, up to a limit: the others have
-- waited less, but for jumps of the clock.
SELECT
    coalesce(sum(queued), 0)::BIGINT AS queued,
    coalesce(sum(queued_low), 0)::BIGINT AS queued_low,
    coalesce(sum(queued_bytes), 0)::BIGINT AS queued_bytes,
    coalesce(sum(in_progress), 0)::BIGINT AS in_progress,
    age.oldest_ms,
    age.overdue
FROM (
    SELECT min(first.queued_ms) AS oldest_ms, least(count(*) FILTER (WHERE first.queued_ms < $2), $3) AS overdue
    FROM generate_series(0, 3) AS class (rank)
    CROSS JOIN LATERAL (
        SELECT jobs.queued_ms FROM jobs
        WHERE jobs.endpoint_id = $1
            AND jobs.status = 'IN_QUEUE'
            AND jobs.epoch = coalesce((SELECT queues.epoch FROM queues WHERE queues.endpoint_id = $1), 0)
            AND jobs.rank = class.rank
        ORDER BY jobs.place, jobs.seq
        LIMIT $3
    ) AS first
) AS age
LEFT JOIN job_counters ON job_counters.endpoint_id = $1
GROUP BY age.oldest_ms, age.overdue;

-- name: begin_epoch
-- Begins the next life of a queue.
INSERT INTO queues (endpoint_id, epoch) VALUES ($1, 1)
ON CONFLICT (endpoint_id) DO UPDATE SET epoch = queues.epoch + 1;

-- name: count_queued
-- What the counters say of the queue of an endpoint.
SELECT
    coalesce(sum(queued), 0)::BIGINT AS queued,
    coalesce(sum(queued_low), 0)::BIGINT AS queued_low,
    coalesce(sum(queued_bytes), 0)::BIGINT AS queued_bytes
FROM job_counters
WHERE endpoint_id = $1;

-- name: cancel_queued_of_batches
-- Counts all queued requests of an endpoint's batches as cancelled.
INSERT INTO batch_counters AS counters (batch_id, shard, queued, in_progress, completed, failed, cancelled)
SELECT batch_id, pg_backend_pid() % 32, -sum(queued), 0, 0, 0, sum(queued)
FROM batch_counters
WHERE batch_id IN (SELECT id FROM batches WHERE endpoint_id = $1)
GROUP BY batch_id
HAVING sum(queued) <> 0
ORDER BY batch_id
ON CONFLICT (batch_id, shard) DO UPDATE SET
    queued = counters.queued + excluded.queued,
    cancelled = counters.cancelled + excluded.cancelled;

-- name: purged_jobs
-- Locks purged jobs that are still there.
SELECT
    jobs.id, jobs.endpoint_id, jobs.key_id, jobs.input_bytes, jobs.status, jobs.sync, jobs.low_priority,
    jobs.created_ms, jobs.queued_ms, jobs.expires_ms, jobs.execution_timeout_ms, jobs.retention_ms, jobs.attempt,
    jobs.retries, jobs.retries_max, jobs.worker_id, jobs.started_ms, jobs.confirmed_ms, jobs.first_output_ms,
    jobs.chunk_read, jobs.finished_ms, jobs.output, jobs.error, jobs.webhook, jobs.s3_config, jobs.batch_id,
    jobs.attempts, jobs.seq
FROM queues
JOIN jobs ON jobs.endpoint_id = queues.endpoint_id AND jobs.status = 'IN_QUEUE' AND jobs.epoch < queues.epoch
LIMIT $1
FOR UPDATE OF jobs SKIP LOCKED;

-- name: delete_jobs
-- Deletes jobs; chunks and idempotency keys go with them.
DELETE FROM jobs WHERE seq = ANY($1::BIGINT[]);
