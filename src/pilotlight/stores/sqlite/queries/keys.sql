-- name: insert_key
-- Stores a new key; nothing is inserted when its id or hash exists.
INSERT INTO api_keys (id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING;

-- name: delete_key
-- Forgets a key.
DELETE FROM api_keys WHERE id = ?;

-- name: keys
-- All keys, oldest first.
SELECT id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s FROM api_keys ORDER BY created_ms, seq;
