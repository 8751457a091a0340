-- name: insert_key
-- Stores a new key; nothing is inserted when its id or hash exists.
INSERT INTO api_keys (
    id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s, priority,
    requests_per_minute, tokens_per_minute, concurrent_max
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
ON CONFLICT DO NOTHING;

-- name: update_key
-- Changes what may change of a key.
UPDATE api_keys
SET name = $1, heartbeat_s = $2, priority = $3,
    requests_per_minute = $4, tokens_per_minute = $5, concurrent_max = $6
WHERE id = $7;

-- name: delete_key
-- Forgets a key.
DELETE FROM api_keys WHERE id = $1;

-- name: keys
-- All keys, oldest first.
SELECT id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s, priority,
       requests_per_minute, tokens_per_minute, concurrent_max
FROM api_keys
ORDER BY created_ms, seq;
