-- The first schema. Moments are integers, milliseconds since the Unix epoch; enumerations are text;
-- bodies are the bytes that came over the wire. Ids that lists are sorted by compare byte by byte, as everywhere.

-- Endpoints and the settings that change in place. Deleted ones stay as tombstones: ids are never reused.
CREATE TABLE endpoints (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    workers_min BIGINT NOT NULL,
    workers_max BIGINT NOT NULL,
    idle_timeout_ms BIGINT NOT NULL,
    scaler TEXT NOT NULL,
    scaler_value DOUBLE PRECISION NOT NULL,
    execution_timeout_ms BIGINT NOT NULL,
    concurrency BIGINT NOT NULL,
    flashboot BOOLEAN NOT NULL,
    created_ms BIGINT NOT NULL,
    updated_ms BIGINT NOT NULL,
    deleted_ms BIGINT
);

-- A name belongs to one living endpoint at a time.
CREATE UNIQUE INDEX endpoints_living_name ON endpoints (name) WHERE deleted_ms IS NULL;

-- What the workers of an endpoint run, version by version; rows are only ever added. `command` is a JSON array,
-- `env` a JSON object.
CREATE TABLE revisions (
    endpoint_id TEXT NOT NULL REFERENCES endpoints (id),
    version INTEGER NOT NULL,
    model TEXT NOT NULL,
    command TEXT NOT NULL,
    env TEXT NOT NULL,
    engine_url TEXT,
    gpu_count INTEGER NOT NULL,
    memory_bytes BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    PRIMARY KEY (endpoint_id, version)
);

-- API keys by hash. `endpoint_ids` is a JSON array.
CREATE TABLE api_keys (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    scope TEXT NOT NULL,
    endpoint_ids TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    created_ms BIGINT NOT NULL
);

-- Workers, living and for a while ended ones. `devices`, `process` and `failure` are JSON.
CREATE TABLE workers (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    endpoint_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    stage TEXT NOT NULL,
    key_hash TEXT NOT NULL,
    devices TEXT NOT NULL,
    memory_bytes BIGINT NOT NULL,
    process TEXT,
    failure TEXT,
    created_ms BIGINT NOT NULL,
    ready_ms BIGINT,
    state_ms BIGINT NOT NULL,
    ended_ms BIGINT
);

CREATE INDEX workers_endpoint ON workers (endpoint_id);

-- Which life the queue of an endpoint is in. A purge begins the next one; what was queued in an earlier one is
-- purged, without having been touched. An endpoint without a row is in life 0.
CREATE TABLE queues (
    endpoint_id TEXT COLLATE "C" PRIMARY KEY,
    epoch BIGINT NOT NULL
);

-- Jobs. `epoch`: life of the queue in which it was queued. `rank`: see common.rank. `deadline_ms`: see
-- common.deadline_ms. `chunks`: number of its next stream chunk. `chunks_read`: number after the last chunk that
-- was drained. `unread_bytes`: chunks from there on. `attempts` is a JSON array. `writer`: random number of the
-- transaction that last changed its state.
CREATE TABLE jobs (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT COLLATE "C" NOT NULL UNIQUE,
    endpoint_id TEXT COLLATE "C" NOT NULL,
    key_id TEXT NOT NULL,
    input BYTEA NOT NULL,
    input_bytes BIGINT NOT NULL,
    status TEXT NOT NULL
        CHECK (status IN ('IN_QUEUE', 'IN_PROGRESS', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
    sync BOOLEAN NOT NULL,
    low_priority BOOLEAN NOT NULL,
    created_ms BIGINT NOT NULL,
    queued_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    execution_timeout_ms BIGINT NOT NULL,
    retention_ms BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    retries INTEGER NOT NULL,
    retries_max INTEGER NOT NULL,
    worker_id TEXT,
    started_ms BIGINT,
    confirmed_ms BIGINT,
    first_output_ms BIGINT,
    chunk_read BOOLEAN NOT NULL,
    finished_ms BIGINT,
    output BYTEA,
    error TEXT,
    webhook TEXT,
    s3_config BYTEA,
    batch_id TEXT COLLATE "C",
    attempts TEXT,
    epoch BIGINT NOT NULL,
    chunks INTEGER NOT NULL DEFAULT 0,
    chunks_read INTEGER NOT NULL DEFAULT 0,
    unread_bytes BIGINT NOT NULL DEFAULT 0,
    writer BIGINT NOT NULL DEFAULT 0,
    rank SMALLINT NOT NULL GENERATED ALWAYS AS (
        CASE WHEN low_priority THEN 4 WHEN batch_id IS NOT NULL THEN 2 ELSE 0 END
        + CASE WHEN attempt = 0 THEN 1 ELSE 0 END
    ) STORED,
    deadline_ms BIGINT NOT NULL GENERATED ALWAYS AS (
        CASE
            WHEN finished_ms IS NOT NULL THEN finished_ms + retention_ms
            WHEN status = 'IN_PROGRESS' THEN least(expires_ms, started_ms + execution_timeout_ms)
            ELSE expires_ms
        END
    ) STORED,
    CHECK ((finished_ms IS NULL) = (status IN ('IN_QUEUE', 'IN_PROGRESS'))),
    CHECK (status <> 'IN_PROGRESS' OR (worker_id IS NOT NULL AND started_ms IS NOT NULL))
);

-- The queue in the order of service, one life after the other, so that what was purged is not even passed by; with
-- the end of each job's time, so that what has none left is passed by within the index.
CREATE INDEX jobs_queue ON jobs (endpoint_id, epoch, rank, queued_ms, seq, expires_ms) WHERE status = 'IN_QUEUE';

-- The jobs of a worker.
CREATE INDEX jobs_running ON jobs (worker_id) WHERE status = 'IN_PROGRESS';

-- Living jobs whose time is over, and ended ones that need not be readable any more.
CREATE INDEX jobs_due ON jobs (deadline_ms, seq) WHERE finished_ms IS NULL;
CREATE INDEX jobs_ended ON jobs (deadline_ms, seq) WHERE finished_ms IS NOT NULL;

-- Lists, newest first.
CREATE INDEX jobs_created ON jobs (endpoint_id, created_ms, id);
CREATE INDEX jobs_created_by_status ON jobs (endpoint_id, status, created_ms, id);

-- The jobs of an endpoint that have not ended, for its deletion.
CREATE INDEX jobs_living ON jobs (endpoint_id, created_ms, seq) WHERE finished_ms IS NULL;

-- The requests of a batch in their order.
CREATE INDEX jobs_batch ON jobs (batch_id, seq) WHERE batch_id IS NOT NULL;

-- Jobs are updated all the time: leave room on their pages, and clean up before a tenth of the table is dead.
ALTER TABLE jobs SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

-- Jobs as the code reads them, without their inputs; what was purged is not there.
CREATE VIEW job_records AS
SELECT
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, output, error, webhook, s3_config, batch_id, attempts, seq, rank,
    deadline_ms, epoch, chunks, chunks_read, unread_bytes, writer
FROM jobs
WHERE status <> 'IN_QUEUE'
    OR epoch >= coalesce((SELECT queues.epoch FROM queues WHERE queues.endpoint_id = jobs.endpoint_id), 0);

-- The same without their outputs, for lists.
CREATE VIEW job_heads AS
SELECT
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, NULL::BYTEA AS output, error, webhook, s3_config, batch_id, attempts,
    seq
FROM job_records;

-- Stream chunks, by attempt; those of an attempt that was queued again are dropped. `writer`: random number of the
-- call that stored it.
CREATE TABLE job_chunks (
    job_seq BIGINT NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    body BYTEA NOT NULL,
    writer BIGINT NOT NULL,
    PRIMARY KEY (job_seq, attempt, sequence)
);

-- What repeated submissions are told by; lives as long as the job.
CREATE TABLE submissions (
    endpoint_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    fingerprint BYTEA NOT NULL,
    job_seq BIGINT NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    PRIMARY KEY (endpoint_id, key_id, idempotency_key)
);

CREATE INDEX submissions_job ON submissions (job_seq);

-- Counters of the queue, kept in the transactions that change jobs; the last three are totals for ever. Several
-- rows per endpoint, whose sum counts, so that transactions that commit at the same time do not wait for each other.
CREATE TABLE job_counters (
    endpoint_id TEXT COLLATE "C" NOT NULL,
    shard SMALLINT NOT NULL,
    queued BIGINT NOT NULL,
    queued_low BIGINT NOT NULL,
    queued_bytes BIGINT NOT NULL,
    in_progress BIGINT NOT NULL,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    retried BIGINT NOT NULL,
    PRIMARY KEY (endpoint_id, shard)
) WITH (fillfactor = 50);

-- Batches without the counters of their jobs.
CREATE TABLE batches (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT COLLATE "C" NOT NULL UNIQUE,
    endpoint_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    name TEXT NOT NULL,
    finalized_ms BIGINT,
    cancel_ms BIGINT,
    total BIGINT NOT NULL,
    input_bytes BIGINT NOT NULL,
    created_ms BIGINT NOT NULL
);

CREATE INDEX batches_endpoint ON batches (endpoint_id, created_ms, seq);
CREATE INDEX batches_created ON batches (created_ms, seq);

-- Counters of a batch's jobs, kept and split like `job_counters`.
CREATE TABLE batch_counters (
    batch_id TEXT COLLATE "C" NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
    shard SMALLINT NOT NULL,
    queued BIGINT NOT NULL,
    in_progress BIGINT NOT NULL,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    cancelled BIGINT NOT NULL,
    PRIMARY KEY (batch_id, shard)
) WITH (fillfactor = 50);

-- Requests of drafts, in their order.
CREATE TABLE batch_drafts (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id TEXT COLLATE "C" NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
    id TEXT COLLATE "C" NOT NULL UNIQUE,
    input BYTEA NOT NULL
);

CREATE INDEX batch_drafts_batch ON batch_drafts (batch_id, seq);

-- Webhook deliveries; without `next_ms` dead letters.
CREATE TABLE webhooks (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    job_id TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    url TEXT NOT NULL,
    host TEXT NOT NULL,
    body BYTEA NOT NULL,
    created_ms BIGINT NOT NULL,
    tries INTEGER NOT NULL,
    next_ms BIGINT,
    last_status INTEGER,
    last_error TEXT NOT NULL
);

CREATE INDEX webhooks_due ON webhooks (next_ms, seq) WHERE next_ms IS NOT NULL;
CREATE INDEX webhooks_dead ON webhooks (created_ms, seq) WHERE next_ms IS NULL;

-- Spans of workers' lives, appended once.
CREATE TABLE usage_intervals (
    worker_id TEXT COLLATE "C" NOT NULL,
    sequence BIGINT NOT NULL,
    endpoint_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    devices INTEGER NOT NULL,
    start_ms BIGINT NOT NULL,
    end_ms BIGINT NOT NULL,
    PRIMARY KEY (worker_id, sequence)
);

CREATE INDEX usage_intervals_endpoint ON usage_intervals (endpoint_id, end_ms);
CREATE INDEX usage_intervals_end ON usage_intervals (end_ms);

-- One row per request of either road.
CREATE TABLE requests (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    road TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    worker_id TEXT NOT NULL,
    route TEXT NOT NULL,
    status INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    arrival_ms BIGINT NOT NULL,
    wait_ms BIGINT NOT NULL,
    first_token_ms BIGINT,
    duration_ms BIGINT NOT NULL,
    tokens_in BIGINT,
    tokens_out BIGINT,
    estimated BOOLEAN NOT NULL
);

CREATE INDEX requests_arrival ON requests (arrival_ms, seq);
CREATE INDEX requests_endpoint ON requests (endpoint_id, arrival_ms, seq);

-- One row per start of a worker. `stages` is a JSON array of pairs; `decided_ms` is the moment of the first.
CREATE TABLE starts (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker_id TEXT NOT NULL UNIQUE,
    endpoint_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    rung TEXT NOT NULL,
    stages TEXT NOT NULL,
    outcome TEXT NOT NULL,
    decided_ms BIGINT NOT NULL
);

CREATE INDEX starts_decided ON starts (decided_ms, seq);
CREATE INDEX starts_endpoint ON starts (endpoint_id, decided_ms, seq);
