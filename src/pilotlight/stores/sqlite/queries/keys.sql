-- name: insert_key
-- Stores a new key; nothing is inserted when its id or hash exists.
INSERT INTO api_keys (
    id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s, priority,
    requests_per_minute, tokens_per_minute, concurrent_max
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING;

-- name: update_key
-- Changes what may change of a key.
UPDATE api_keys
SET name = ?, heartbeat_s = ?, priority = ?,
    requests_per_minute = ?, tokens_per_minute = ?, concurrent_max = ?
WHERE id = ?;

-- name: delete_key
-- Forgets a key.
DELETE FROM api_keys WHERE id = ?;

-- name: keys
-- All keys, oldest first.
SELECT id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s, priority,
       requests_per_minute, tokens_per_minute, concurrent_max
FROM api_keys
ORDER BY created_ms, seq;
