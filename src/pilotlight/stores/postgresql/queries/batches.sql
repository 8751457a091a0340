-- name: lock_cancelled_batches
-- When some batches were cancelled; from now on that does not change.
SELECT id, cancel_ms FROM batches WHERE id = ANY($1::TEXT[]) ORDER BY id FOR SHARE;

-- name: insert_batch
-- Stores a new draft; nothing is inserted when the id exists.
INSERT INTO batches (id, endpoint_id, key_id, name, finalized_ms, cancel_ms, total, input_bytes, created_ms)
VALUES ($1, $2, $3, $4, NULL, NULL, 0, 0, $5)
ON CONFLICT (id) DO NOTHING;

-- name: insert_drafts
-- Appends requests to a draft, in order; those whose id exists are left out.
INSERT INTO batch_drafts (batch_id, id, input)
SELECT $1, new.id, new.input
FROM unnest($2::TEXT[], $3::BYTEA[]) WITH ORDINALITY AS new (id, input, place)
ORDER BY new.place
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: resize_batch
-- Adds to the number and size of a batch's requests.
UPDATE batches SET total = total + $2, input_bytes = input_bytes + $3 WHERE id = $1;

-- name: delete_draft
-- Takes a request out of a draft.
DELETE FROM batch_drafts WHERE batch_id = $1 AND id = $2 RETURNING length(input);

-- name: rename_batch
-- Gives a batch another name.
UPDATE batches SET name = $2 WHERE id = $1;

-- name: drafts_after
-- Requests of a draft after a position, in order, as many as fit into a number of bytes, but at least one.
SELECT seq, id, input FROM (
    SELECT
        seq, id, input, sum(length(input)) OVER (ORDER BY seq) AS bytes, row_number() OVER (ORDER BY seq) AS place
    FROM (SELECT seq, id, input FROM batch_drafts WHERE batch_id = $1 AND seq > $2 ORDER BY seq LIMIT 1000) AS slice
) AS waiting
WHERE bytes <= $3 OR place = 1
ORDER BY seq;

-- name: delete_drafts
-- Forgets all requests of a draft.
DELETE FROM batch_drafts WHERE batch_id = $1;

-- name: finalize_batch
-- Remembers when a batch was queued.
UPDATE batches SET finalized_ms = $2 WHERE id = $1;

-- name: mark_batch_cancelled
-- Remembers when a batch was cancelled.
UPDATE batches SET cancel_ms = $2 WHERE id = $1;

-- name: queued_jobs_of_batch
-- Locks the queued requests of a batch, in the order of their ids like all that lock jobs.
SELECT * FROM job_records WHERE batch_id = $1 AND status = 'IN_QUEUE' ORDER BY id FOR UPDATE;

-- name: lock_batch
-- Locks a batch, so that neither its requests nor its cancellation change; its counters may.
SELECT id FROM batches WHERE id = $1 FOR NO KEY UPDATE;

-- name: batch
-- One batch with its counters.
SELECT
    batches.id, batches.endpoint_id, batches.key_id, batches.name, batches.finalized_ms, batches.cancel_ms,
    batches.total, batches.input_bytes, coalesce(sum(counters.queued), 0)::BIGINT AS queued,
    coalesce(sum(counters.in_progress), 0)::BIGINT AS in_progress,
    coalesce(sum(counters.completed), 0)::BIGINT AS completed, coalesce(sum(counters.failed), 0)::BIGINT AS failed,
    coalesce(sum(counters.cancelled), 0)::BIGINT AS cancelled, batches.created_ms
FROM batches
LEFT JOIN batch_counters AS counters ON counters.batch_id = batches.id
WHERE batches.id = $1
GROUP BY batches.seq;

-- name: batches
-- The newest batches of an endpoint with their counters.
SELECT
    latest.id, latest.endpoint_id, latest.key_id, latest.name, latest.finalized_ms, latest.cancel_ms,
    latest.total, latest.input_bytes, coalesce(counters.queued, 0)::BIGINT AS queued,
    coalesce(counters.in_progress, 0)::BIGINT AS in_progress, coalesce(counters.completed, 0)::BIGINT AS completed,
    coalesce(counters.failed, 0)::BIGINT AS failed, coalesce(counters.cancelled, 0)::BIGINT AS cancelled,
    latest.created_ms
FROM (SELECT * FROM batches WHERE endpoint_id = $1 ORDER BY created_ms DESC, seq DESC LIMIT $2) AS latest
LEFT JOIN LATERAL (
    SELECT
        sum(queued) AS queued, sum(in_progress) AS in_progress, sum(completed) AS completed, sum(failed) AS failed,
        sum(cancelled) AS cancelled
    FROM batch_counters
    WHERE batch_id = latest.id
) AS counters ON TRUE
ORDER BY latest.created_ms DESC, latest.seq DESC;

-- name: draft_page
-- A page of a draft's requests in their order.
SELECT id, input FROM batch_drafts WHERE batch_id = $1 ORDER BY seq OFFSET $2 LIMIT $3;

-- name: request_page
-- A page of a batch's requests in their order, once they are jobs.
SELECT * FROM job_records WHERE batch_id = $1 ORDER BY seq OFFSET $2 LIMIT $3;

-- name: prune_drafts
-- Forgets some requests of drafts whose endpoint was deleted.
DELETE FROM batch_drafts WHERE seq IN (
    SELECT batch_drafts.seq
    FROM batches
    JOIN endpoints ON endpoints.id = batches.endpoint_id
    JOIN batch_drafts ON batch_drafts.batch_id = batches.id
    WHERE batches.finalized_ms IS NULL AND batches.cancel_ms IS NULL AND endpoints.deleted_ms IS NOT NULL
    LIMIT $1
);

-- name: old_batches
-- Batches made before a moment that have no job left and nothing to do, and empty drafts of deleted endpoints.
SELECT batches.id
FROM batches
WHERE (
        batches.created_ms < $1
        AND (batches.finalized_ms IS NOT NULL OR batches.cancel_ms IS NOT NULL)
        AND NOT EXISTS (
            SELECT 1 FROM batch_counters WHERE batch_id = batches.id
            HAVING sum(in_progress) > 0 OR (batches.cancel_ms IS NULL AND sum(queued) > 0)
        )
        AND NOT EXISTS (SELECT 1 FROM job_records WHERE job_records.batch_id = batches.id)
    )
    OR (
        batches.finalized_ms IS NULL AND batches.cancel_ms IS NULL
        AND EXISTS (
            SELECT 1 FROM endpoints
            WHERE endpoints.id = batches.endpoint_id AND endpoints.deleted_ms IS NOT NULL
        )
        AND NOT EXISTS (SELECT 1 FROM batch_drafts WHERE batch_drafts.batch_id = batches.id)
    )
ORDER BY batches.created_ms, batches.seq
LIMIT $2
FOR UPDATE OF batches SKIP LOCKED;

-- name: delete_batches
-- Forgets batches with their counters and drafts.
DELETE FROM batches WHERE id = ANY($1::TEXT[]);
