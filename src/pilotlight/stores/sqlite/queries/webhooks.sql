-- name: put_webhook
-- Stores or replaces a delivery.
INSERT INTO webhooks (
    id, job_id, endpoint_id, url, body, created_ms, tries, next_ms, last_status, last_error, host
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    job_id = excluded.job_id,
    endpoint_id = excluded.endpoint_id,
    url = excluded.url,
    body = excluded.body,
    created_ms = excluded.created_ms,
    tries = excluded.tries,
    next_ms = excluded.next_ms,
    last_status = excluded.last_status,
    last_error = excluded.last_error,
    host = excluded.host;

-- name: due_webhooks
-- Deliveries whose next try is due, the longest due first, without some by id and some by host (JSON arrays).
SELECT id, job_id, endpoint_id, url, body, created_ms, tries, next_ms, last_status, last_error
FROM webhooks
WHERE
    next_ms IS NOT NULL AND next_ms <= ?
    AND id NOT IN (SELECT value FROM json_each(?))
    AND host NOT IN (SELECT value FROM json_each(?))
ORDER BY next_ms, seq
LIMIT ?;

-- name: next_webhook
-- When the next try of any delivery is due.
SELECT min(next_ms) FROM webhooks WHERE next_ms IS NOT NULL;

-- name: delete_webhook
-- Forgets a delivery.
DELETE FROM webhooks WHERE id = ?;

-- name: webhook
-- One delivery by its id.
SELECT id, job_id, endpoint_id, url, body, created_ms, tries, next_ms, last_status, last_error
FROM webhooks
WHERE id = ?;

-- name: dead_webhooks
-- Dead letters of one endpoint, or (without an id) of all, newest first; a length instead of the body.
SELECT
    id, job_id, endpoint_id, url, x'', created_ms, tries, next_ms, last_status, last_error, length(body)
FROM webhooks
WHERE next_ms IS NULL AND (?1 IS NULL OR endpoint_id = ?1)
ORDER BY created_ms DESC, seq DESC
LIMIT ?2;

-- name: drop_dead_webhooks
-- Forgets all but the newest dead letters.
DELETE FROM webhooks WHERE seq IN (
    SELECT seq FROM webhooks WHERE next_ms IS NULL ORDER BY created_ms DESC, seq DESC LIMIT -1 OFFSET ?
);

-- name: trim_webhooks
-- Takes their bodies from the oldest deliveries beyond bounds for a host, in all, and in age; all are dead then.
UPDATE webhooks SET
    body = x'',
    next_ms = NULL,
    last_error = CASE WHEN next_ms IS NULL THEN last_error ELSE ?1 END
WHERE seq IN (
    SELECT seq FROM (
        SELECT
            seq, created_ms,
            sum(length(body)) OVER (
                PARTITION BY next_ms IS NULL, host ORDER BY created_ms DESC, seq DESC ROWS UNBOUNDED PRECEDING
            ) AS of_host,
            sum(length(body)) OVER (
                PARTITION BY next_ms IS NULL ORDER BY created_ms DESC, seq DESC ROWS UNBOUNDED PRECEDING
            ) AS of_all
        FROM webhooks
        WHERE length(body) > 0
    )
    WHERE of_host > ?2 OR of_all > ?3 OR created_ms < ?4
);
