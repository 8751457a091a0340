CREATE INDEX batch_drafts_batch ON batch_drafts (batch_seq, seq);

CREATE INDEX batches_created ON batches (created_ms);

CREATE INDEX batches_endpoint ON batches (endpoint_id, created_ms, seq);

CREATE UNIQUE INDEX endpoints_living_name ON endpoints (name) WHERE deleted_ms IS NULL;

CREATE INDEX idempotency_job ON idempotency (job_seq);

CREATE INDEX jobs_batch ON jobs (batch_id, seq) WHERE batch_id IS NOT NULL;

CREATE INDEX jobs_due ON jobs (deadline_ms) WHERE finished_ms IS NULL;

CREATE INDEX jobs_ended ON jobs (deadline_ms) WHERE finished_ms IS NOT NULL;

CREATE INDEX jobs_listed ON jobs (endpoint_id, status, created_ms);

CREATE INDEX jobs_queue ON jobs (endpoint_id, purges, rank, place, seq, queued_ms, expires_ms)
WHERE status = 'IN_QUEUE';

CREATE INDEX jobs_running ON jobs (worker_id) WHERE status = 'IN_PROGRESS';

CREATE INDEX request_segments_endpoint ON request_segments (endpoint_id, last_ms, seq);

CREATE INDEX request_segments_last ON request_segments (last_ms, seq, records);

CREATE INDEX starts_decided ON starts (decided_ms, seq);

CREATE INDEX starts_endpoint ON starts (endpoint_id, decided_ms, seq);

CREATE INDEX usage_intervals_end ON usage_intervals (end_ms);

CREATE INDEX usage_intervals_endpoint ON usage_intervals (endpoint_id, end_ms);

CREATE INDEX webhooks_dead ON webhooks (created_ms, seq) WHERE next_ms IS NULL;

CREATE INDEX webhooks_due ON webhooks (next_ms, seq) WHERE next_ms IS NOT NULL;

CREATE INDEX workers_endpoint ON workers (endpoint_id);

CREATE TABLE api_keys (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    scope TEXT NOT NULL,
    endpoint_ids TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    created_ms INTEGER NOT NULL
, heartbeat_s REAL, priority TEXT NOT NULL DEFAULT 'normal', requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrent_max INTEGER) STRICT;

CREATE TABLE batch_drafts (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    batch_seq INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE,
    body BLOB NOT NULL
) STRICT;

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

CREATE TABLE endpoints (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    workers_min INTEGER NOT NULL,
    workers_max INTEGER NOT NULL,
    idle_timeout_ms INTEGER NOT NULL,
    scaler TEXT NOT NULL,
    scaler_value REAL NOT NULL,
    execution_timeout_ms INTEGER NOT NULL,
    concurrency INTEGER NOT NULL,
    flashboot INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL,
    deleted_ms INTEGER, kind TEXT NOT NULL DEFAULT 'vllm', routing TEXT NOT NULL DEFAULT 'auto',
    FOREIGN KEY (id, version) REFERENCES revisions (endpoint_id, version) DEFERRABLE INITIALLY DEFERRED
) STRICT;

CREATE TABLE idempotency (
    endpoint_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    job_seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    PRIMARY KEY (endpoint_id, key_id, key)
) STRICT, WITHOUT ROWID;

CREATE TABLE "job_chunks" (
    job_seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (job_seq, attempt, sequence)
) STRICT, WITHOUT ROWID;

CREATE TABLE job_counters (
    endpoint_id TEXT PRIMARY KEY,
    queued INTEGER NOT NULL,
    queued_low INTEGER NOT NULL,
    in_progress INTEGER NOT NULL,
    completed INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    retried INTEGER NOT NULL
, queued_bytes INTEGER NOT NULL DEFAULT 0, purges INTEGER NOT NULL DEFAULT 0) STRICT, WITHOUT ROWID;

CREATE TABLE job_inputs (
    job_seq INTEGER PRIMARY KEY REFERENCES jobs (seq) ON DELETE CASCADE,
    body BLOB NOT NULL
) STRICT;

CREATE TABLE "jobs" (
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
    ) VIRTUAL, place INTEGER NOT NULL GENERATED ALWAYS AS (
    CASE WHEN attempt = 0 THEN 0 ELSE queued_ms END
) VIRTUAL,
    CHECK ((finished_ms IS NULL) = (status IN ('IN_QUEUE', 'IN_PROGRESS'))),
    CHECK (status <> 'IN_PROGRESS' OR (worker_id IS NOT NULL AND started_ms IS NOT NULL))
) STRICT;

CREATE TABLE request_segments (
    seq INTEGER PRIMARY KEY,
    endpoint_id TEXT NOT NULL,
    last_ms INTEGER NOT NULL,
    records INTEGER NOT NULL,
    data TEXT NOT NULL
) STRICT;

CREATE TABLE revisions (
    endpoint_id TEXT NOT NULL REFERENCES endpoints (id) DEFERRABLE INITIALLY DEFERRED,
    version INTEGER NOT NULL,
    model TEXT NOT NULL,
    env TEXT NOT NULL,
    engine_url TEXT,
    gpu_count INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    created_ms INTEGER NOT NULL, command TEXT NOT NULL DEFAULT '[]', container TEXT,
    PRIMARY KEY (endpoint_id, version)
) STRICT, WITHOUT ROWID;

CREATE TABLE "starts" (
    seq INTEGER PRIMARY KEY,
    worker_id TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    rung TEXT NOT NULL,
    stages TEXT NOT NULL,
    outcome TEXT NOT NULL,
    memory_bytes INTEGER,
    note TEXT NOT NULL,
    failure TEXT,
    decided_ms INTEGER NOT NULL,
    UNIQUE (worker_id, decided_ms)
) STRICT;

CREATE TABLE usage_intervals (
    worker_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    endpoint_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    devices INTEGER NOT NULL,
    start_ms INTEGER NOT NULL,
    end_ms INTEGER NOT NULL,
    PRIMARY KEY (worker_id, sequence)
) STRICT, WITHOUT ROWID;

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

CREATE TABLE workers (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    endpoint_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL,
    stage TEXT NOT NULL,
    key_hash TEXT NOT NULL,
    devices TEXT NOT NULL,
    memory_bytes INTEGER NOT NULL,
    process TEXT,
    failure TEXT,
    created_ms INTEGER NOT NULL,
    ready_ms INTEGER,
    state_ms INTEGER NOT NULL,
    ended_ms INTEGER
) STRICT;

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

CREATE VIEW job_summaries AS
SELECT
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, worker_id, started_ms, confirmed_ms,
    first_output_ms, chunk_read, finished_ms, NULL AS output, error, webhook, s3_config, batch_id, attempts,
    seq
FROM job_records;

CREATE VIEW requests AS
SELECT
    json_extract(value, '$[0]') AS id,
    json_extract(value, '$[1]') AS road,
    json_extract(value, '$[2]') AS endpoint_id,
    json_extract(value, '$[3]') AS key_id,
    json_extract(value, '$[4]') AS worker_id,
    json_extract(value, '$[5]') AS route,
    json_extract(value, '$[6]') AS status,
    json_extract(value, '$[7]') AS outcome,
    json_extract(value, '$[8]') AS arrival_ms,
    json_extract(value, '$[9]') AS wait_ms,
    json_extract(value, '$[10]') AS first_token_ms,
    json_extract(value, '$[11]') AS duration_ms,
    json_extract(value, '$[12]') AS tokens_in,
    json_extract(value, '$[13]') AS tokens_out,
    json_extract(value, '$[14]') AS estimated
FROM request_segments, json_each(data);
