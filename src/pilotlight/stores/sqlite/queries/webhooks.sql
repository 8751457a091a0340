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
-- Dead letters of one endpoint, or (without an id) of all, newest first.
SELECT id, job_id, endpoint_id, url, body, created_ms, tries, next_ms, last_status, last_error
FROM webhooks
WHERE next_ms IS NULL AND (?1 IS NULL OR endpoint_id = ?1)
ORDER BY created_ms DESC, seq DESC
LIMIT ?2;

-- name: drop_dead_webhooks
-- Forgets all but the newest dead letters.
DELETE FROM webhooks WHERE seq IN (
    SELECT seq FROM webhooks WHERE next_ms IS NULL ORDER BY created_ms DESC, seq DESC LIMIT -1 OFFSET ?
);
