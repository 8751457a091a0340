-- name: insert_batch
-- Stores a new batch; nothing is inserted when the id exists.
INSERT INTO batches (
    id, endpoint_id, key_id, name, finalized_ms, cancel_ms, total, input_bytes, queued, in_progress,
    completed, failed, cancelled, created_ms
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING;

-- name: batch
-- One batch by its id.
SELECT
    seq, id, endpoint_id, key_id, name, finalized_ms, cancel_ms, total, input_bytes, queued, in_progress,
    completed, failed, cancelled, created_ms
FROM batches
WHERE id = ?;

-- name: batches
-- The batches of an endpoint, newest first.
SELECT
    seq, id, endpoint_id, key_id, name, finalized_ms, cancel_ms, total, input_bytes, queued, in_progress,
    completed, failed, cancelled, created_ms
FROM batches
WHERE endpoint_id = ?
ORDER BY created_ms DESC, seq DESC
LIMIT ?;

-- name: batch_cancelled
-- Whether a batch has been cancelled.
SELECT cancel_ms IS NOT NULL FROM batches WHERE id = ?;

-- name: change_batch
-- Adds to the counters of one batch.
UPDATE batches SET
    queued = queued + ?, in_progress = in_progress + ?, completed = completed + ?, failed = failed + ?,
    cancelled = cancelled + ?
WHERE id = ?;

-- name: purge_batches
-- Counts the queued requests of an endpoint's batches as cancelled.
UPDATE batches SET cancelled = cancelled + queued, queued = 0 WHERE endpoint_id = ? AND queued > 0;

-- name: rename_batch
-- Gives a batch another name.
UPDATE batches SET name = ? WHERE seq = ?;

-- name: resize_batch
-- Counts the requests of a draft anew.
UPDATE batches SET (total, input_bytes) = (
    SELECT count(*), coalesce(sum(length(body)), 0) FROM batch_drafts WHERE batch_seq = ?1
)
WHERE seq = ?1;

-- name: request_id_used
-- Whether an id belongs to a request of a draft or to a job.
SELECT
    EXISTS (SELECT 1 FROM batch_drafts WHERE id = ?1)
    OR EXISTS (SELECT 1 FROM jobs WHERE id = ?1);

-- name: insert_draft
-- Appends a request to a draft.
INSERT INTO batch_drafts (id, batch_seq, body) VALUES (?, ?, ?);

-- name: delete_draft
-- Takes a request out of a draft.
DELETE FROM batch_drafts WHERE id = ? AND batch_seq = ?;

-- name: drafts
-- A page of the requests of a draft, in their order.
SELECT id, body FROM batch_drafts WHERE batch_seq = ? ORDER BY seq LIMIT ? OFFSET ?;

-- name: draft_id_used
-- An id of a draft's requests that a job has already.
SELECT batch_drafts.id FROM batch_drafts JOIN jobs ON jobs.id = batch_drafts.id WHERE batch_drafts.batch_seq = ?;

-- name: queue_drafts
-- Makes jobs of the requests of a draft, in their order.
INSERT INTO jobs (
    id, endpoint_id, key_id, input_bytes, status, sync, low_priority, created_ms, queued_ms, expires_ms,
    execution_timeout_ms, retention_ms, attempt, retries, retries_max, chunk_read, webhook, s3_config,
    batch_id, purges
)
SELECT id, ?2, ?3, length(body), ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, 0, 0, ?12, 0, ?13, ?14, ?15, ?16
FROM batch_drafts
WHERE batch_seq = ?1
ORDER BY seq;

-- name: queue_draft_inputs
-- Gives the jobs made of a draft their inputs.
INSERT INTO job_inputs (job_seq, body)
SELECT jobs.seq, batch_drafts.body
FROM batch_drafts
JOIN jobs ON jobs.id = batch_drafts.id
WHERE batch_drafts.batch_seq = ?;

-- name: delete_drafts
-- Forgets the requests of a draft, which are jobs now.
DELETE FROM batch_drafts WHERE batch_seq = ?;

-- name: finalize_batch
-- Marks a batch as queued.
UPDATE batches SET finalized_ms = ?, queued = total WHERE seq = ?;

-- name: cancel_batch
-- Marks a batch as cancelled.
UPDATE batches SET cancel_ms = ? WHERE seq = ?;

-- name: queued_requests
-- The requests of a batch that wait, in their order.
SELECT * FROM job_records WHERE batch_id = ? AND status = 'IN_QUEUE' ORDER BY seq;

-- name: batch_jobs
-- A page of the requests of a batch, in their order.
SELECT * FROM job_records WHERE batch_id = ? ORDER BY seq LIMIT ? OFFSET ?;

-- name: prune_drafts
-- Forgets some requests of drafts whose endpoint was deleted. The joins keep SQLite from beginning with the requests.
DELETE FROM batch_drafts WHERE seq IN (
    SELECT batch_drafts.seq
    FROM batches
    CROSS JOIN endpoints ON endpoints.id = batches.endpoint_id
    CROSS JOIN batch_drafts ON batch_drafts.batch_seq = batches.seq
    WHERE endpoints.deleted_ms IS NOT NULL AND batches.cancel_ms IS NULL AND batches.finalized_ms IS NULL
    LIMIT ?
);

-- name: prune_batches
-- Forgets batches that ended and have no jobs left, made before a moment, and empty drafts of deleted endpoints.
DELETE FROM batches WHERE seq IN (
    SELECT seq FROM batches
    WHERE
        (
            created_ms < ?
            AND (
                (cancel_ms IS NOT NULL AND in_progress = 0)
                OR (cancel_ms IS NULL AND finalized_ms IS NOT NULL AND queued + in_progress = 0)
            )
            AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.batch_id = batches.id)
        )
        OR (
            cancel_ms IS NULL AND finalized_ms IS NULL
            AND EXISTS (
                SELECT 1 FROM endpoints
                WHERE endpoints.id = batches.endpoint_id AND endpoints.deleted_ms IS NOT NULL
            )
            AND NOT EXISTS (SELECT 1 FROM batch_drafts WHERE batch_drafts.batch_seq = batches.seq)
        )
    ORDER BY created_ms
    LIMIT ?
);
