-- The queue of the whole native API: kinds of endpoints, the story of a job, idempotency, purging, batches,
-- webhooks. The table of jobs is built anew, for SQLite changes no expression, check or key in place.

ALTER TABLE endpoints ADD COLUMN kind TEXT NOT NULL DEFAULT 'vllm';

-- What a worker of the other kinds runs: program and arguments, a JSON array.
ALTER TABLE revisions ADD COLUMN command TEXT NOT NULL DEFAULT '[]';

DROP VIEW job_records;

-- Jobs without their inputs, which are large, never change, and would be copied with every change of a row.
-- `purges`: how often the queue had been purged when the job was queued; fewer than now means it is purged.
-- `attempts`: JSON array of the attempts before the current one; NULL when there was none.
-- `chunks`: number of the next chunk. `chunks_read`: chunks below this one were returned to a reader.
-- `chunk_bytes`: length of those that were not.
-- `rank`: twice the lane (normal, batch, low), and one more unless it was handed out before.
-- `deadline_ms`: end of the time to live or to run; once ended, of the time to stay readable.
CREATE TABLE new_jobs (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    endpoint_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    input_bytes INTEGER NOT NULL,
    status TEXT NOT NULL
        CHECK (status IN ('IN_QUEUE', 'IN_PROGRESS', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
    sync INTEGER NOT NULL,
    low_priority INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    queued_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    execution_timeout_ms INTEGER NOT NULL,
    retention_ms INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    retries INTEGER NOT NULL,
    retries_max INTEGER NOT NULL,
    worker_id TEXT,
    started_ms INTEGER,
    confirmed_ms INTEGER,
    first_output_ms INTEGER,
    chunk_read INTEGER NOT NULL,
    finished_ms INTEGER,
    error TEXT,
    webhook TEXT,
    s3_config BLOB,
    batch_id TEXT,
    attempts TEXT,
    purges INTEGER NOT NULL,
    chunks INTEGER NOT NULL DEFAULT 0,
    chunks_read INTEGER NOT NULL DEFAULT 0,
    chunk_bytes INTEGER NOT NULL DEFAULT 0,
    output BLOB,
    rank INTEGER NOT NULL GENERATED ALWAYS AS (
        CASE WHEN low_priority THEN 4 WHEN batch_id IS NOT NULL THEN 2 ELSE 0 END + (attempt = 0)
    ) VIRTUAL,
    deadline_ms INTEGER NOT NULL GENERATED ALWAYS AS (
        CASE
            WHEN finished_ms IS NOT NULL THEN finished_ms + retention_ms
            WHEN status = 'IN_PROGRESS' THEN min(expires_ms, started_ms + execution_timeout_ms)
            ELSE expires_ms
        END
    ) VIRTUAL,
    CHECK ((finished_ms IS NULL) = (status IN ('IN_QUEUE', 'IN_PROGRESS'))),
    CHECK (status <> 'IN_PROGRESS' OR (worker_id IS NOT NULL AND started_ms IS NOT NULL))
) STRICT;

INSERT INTO new_jobs (
    seq, id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    chunk_read, finished_ms, error, purges, chunks, chunks_read, chunk_bytes, output
)
SELECT
    jobs.seq, jobs.id, jobs.endpoint_id, jobs.key_id, length(job_inputs.body), jobs.status, jobs.sync,
    jobs.low_priority, jobs.created_ms, jobs.queued_ms, jobs.expires_ms, jobs.execution_timeout_ms,
    jobs.retention_ms, jobs.attempt, jobs.retries, 1, jobs.worker_id, jobs.started_ms,
    CASE WHEN jobs.confirmed THEN jobs.started_ms END, jobs.chunk_read, jobs.finished_ms, jobs.error, 0,
    jobs.chunks,
    coalesce((SELECT min(sequence) FROM job_chunks WHERE job_chunks.job_seq = jobs.seq), jobs.chunks),
    coalesce((SELECT sum(length(body)) FROM job_chunks WHERE job_chunks.job_seq = jobs.seq), 0),
    jobs.output
FROM jobs
JOIN job_inputs ON job_inputs.job_seq = jobs.seq
ORDER BY jobs.seq;

-- Stream chunks of the current attempt, read ones included.
CREATE TABLE new_job_chunks (
    job_seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (job_seq, attempt, sequence)
) STRICT, WITHOUT ROWID;

INSERT INTO new_job_chunks (job_seq, attempt, sequence, body)
SELECT job_chunks.job_seq, jobs.attempt, job_chunks.sequence, job_chunks.body
FROM job_chunks
JOIN jobs ON jobs.seq = job_chunks.job_seq;

DROP TABLE job_chunks;
DROP TABLE jobs;
ALTER TABLE new_jobs RENAME TO jobs;
ALTER TABLE new_job_chunks RENAME TO job_chunks;

-- The queue in the order of service; holds what a take has to look at.
CREATE INDEX jobs_queue ON jobs (endpoint_id, purges, rank, queued_ms, seq, expires_ms)
WHERE status = 'IN_QUEUE';

-- The jobs of a worker.
CREATE INDEX jobs_running ON jobs (worker_id) WHERE status = 'IN_PROGRESS';

-- Living jobs whose time is over, and ended ones that need not be readable any more.
CREATE INDEX jobs_due ON jobs (deadline_ms) WHERE finished_ms IS NULL;
CREATE INDEX jobs_ended ON jobs (deadline_ms) WHERE finished_ms IS NOT NULL;

-- Lists of the jobs in one state, newest first.
CREATE INDEX jobs_listed ON jobs (endpoint_id, status, created_ms);

-- The requests of a batch, in their order.
CREATE INDEX jobs_batch ON jobs (batch_id, seq) WHERE batch_id IS NOT NULL;

ALTER TABLE job_counters ADD COLUMN queued_bytes INTEGER NOT NULL DEFAULT 0;

-- How often the queue was purged.
ALTER TABLE job_counters ADD COLUMN purges INTEGER NOT NULL DEFAULT 0;

UPDATE job_counters SET queued_bytes = (
    SELECT coalesce(sum(jobs.input_bytes), 0) FROM jobs
    WHERE jobs.endpoint_id = job_counters.endpoint_id AND jobs.status = 'IN_QUEUE'
);

-- What makes a repeated submission find its job; goes with the job.
CREATE TABLE idempotency (
    endpoint_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    job_seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    PRIMARY KEY (endpoint_id, key_id, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_job ON idempotency (job_seq);

-- Batches with counters of their requests, kept in the transactions that change jobs.
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    endpoint_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    name TEXT NOT NULL,
    finalized_ms INTEGER,
    cancel_ms INTEGER,
    total INTEGER NOT NULL,
    input_bytes INTEGER NOT NULL,
    queued INTEGER NOT NULL,
    in_progress INTEGER NOT NULL,
    completed INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    cancelled INTEGER NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT;

CREATE INDEX batches_endpoint ON batches (endpoint_id, created_ms, seq);
CREATE INDEX batches_created ON batches (created_ms);

-- Requests of batches that are drafts.
CREATE TABLE batch_drafts (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    batch_seq INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE,
    body BLOB NOT NULL
) STRICT;

CREATE INDEX batch_drafts_batch ON batch_drafts (batch_seq, seq);

-- Webhook deliveries: `next_ms` says when to try next, NULL marks a dead letter.
CREATE TABLE webhooks (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    job_id TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    url TEXT NOT NULL,
    host TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    tries INTEGER NOT NULL,
    next_ms INTEGER,
    last_status INTEGER,
    last_error TEXT NOT NULL,
    body BLOB NOT NULL
) STRICT;

CREATE INDEX webhooks_due ON webhooks (next_ms, seq) WHERE next_ms IS NOT NULL;
CREATE INDEX webhooks_dead ON webhooks (created_ms, seq) WHERE next_ms IS NULL;

-- A job as the code reads it; purged ones are not there any more.
CREATE VIEW job_records AS
SELECT
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, output, error, webhook, s3_config, batch_id, attempts,
    seq, rank, deadline_ms, purges, chunks, chunks_read, chunk_bytes
FROM jobs
WHERE
    status <> 'IN_QUEUE'
    OR purges = coalesce(
        (SELECT job_counters.purges FROM job_counters WHERE job_counters.endpoint_id = jobs.endpoint_id), 0
    );

-- The same without the output, which may be large.
CREATE VIEW job_summaries AS
SELECT
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, NULL AS output, error, webhook, s3_config, batch_id, attempts,
    seq
FROM job_records;
