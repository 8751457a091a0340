-- name: put_webhooks
-- Inserts or replaces deliveries.
INSERT INTO webhooks (
    id, job_id, endpoint_id, url, host, body, created_ms, tries, next_ms, last_status, last_error
)
SELECT * FROM unnest(
    $1::TEXT[], $2::TEXT[], $3::TEXT[], $4::TEXT[], $5::TEXT[], $6::BYTEA[], $7::BIGINT[], $8::INTEGER[],
    $9::BIGINT[], $10::INTEGER[], $11::TEXT[]
)
ON CONFLICT (id) DO UPDATE SET
    job_id = excluded.job_id,
    endpoint_id = excluded.endpoint_id,
    url = excluded.url,
    host = excluded.host,
    body = excluded.body,
    created_ms = excluded.created_ms,
    tries = excluded.tries,
    next_ms = excluded.next_ms,
    last_status = excluded.last_status,
    last_error = excluded.last_error;

-- name: drop_dead_webhooks
-- Forgets all but the newest dead letters.
DELETE FROM webhooks WHERE seq IN (
    SELECT seq FROM webhooks WHERE next_ms IS NULL ORDER BY created_ms DESC, seq DESC OFFSET $1
);

-- name: due_webhooks
-- Deliveries whose next try is due, the longest due first, without some by id and some by host.
SELECT id, job_id, endpoint_id, url, body, created_ms, tries, next_ms, last_status, last_error
FROM webhooks
WHERE next_ms <= $1 AND id <> ALL($3::TEXT[]) AND host <> ALL($4::TEXT[])
ORDER BY next_ms, seq
LIMIT $2;

-- name: next_webhook
-- When the next try of any delivery is due.
SELECT min(next_ms) FROM webhooks WHERE next_ms IS NOT NULL;

-- name: delete_webhook
-- Forgets a delivery.
DELETE FROM webhooks WHERE id = $1;

-- name: webhook
-- One delivery.
SELECT id, job_id, endpoint_id, url, body, created_ms, tries, next_ms, last_status, last_error
FROM webhooks
WHERE id = $1;

-- name: dead_webhooks
-- Dead letters of one endpoint, or (without an id) of all, newest first; a length instead of the body.
SELECT
    id, job_id, endpoint_id, url, ''::BYTEA AS body, created_ms, tries, next_ms, last_status, last_error,
    octet_length(body) AS size
FROM webhooks
WHERE next_ms IS NULL AND ($1::TEXT IS NULL OR endpoint_id = $1)
ORDER BY created_ms DESC, seq DESC
LIMIT $2;

-- name: trim_webhooks
-- Takes their bodies from the oldest deliveries beyond bounds for a host, in all, and in age; all are dead then.
UPDATE webhooks SET
    body = '',
    next_ms = NULL,
    last_error = CASE WHEN next_ms IS NULL THEN last_error ELSE $1::TEXT END
WHERE seq IN (
    SELECT seq FROM (
        SELECT
            seq, created_ms,
            sum(octet_length(body)) OVER (
                PARTITION BY next_ms IS NULL, host ORDER BY created_ms DESC, seq DESC ROWS UNBOUNDED PRECEDING
            ) AS of_host,
            sum(octet_length(body)) OVER (
                PARTITION BY next_ms IS NULL ORDER BY created_ms DESC, seq DESC ROWS UNBOUNDED PRECEDING
            ) AS of_all
        FROM webhooks
        WHERE octet_length(body) > 0
    ) AS kept
    WHERE of_host > $2::BIGINT OR of_all > $3::BIGINT OR created_ms < $4::BIGINT
);
