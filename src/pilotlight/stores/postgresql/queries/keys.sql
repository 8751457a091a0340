-- name: insert_key
-- Stores a new key; nothing is inserted when its id or hash exists.
INSERT INTO api_keys (id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT DO NOTHING;

-- name: delete_key
-- Forgets a key.
DELETE FROM api_keys WHERE id = $1;

-- name: keys
-- All keys, oldest first.
SELECT id, name, scope, endpoint_ids, hash, created_ms, heartbeat_s FROM api_keys ORDER BY created_ms, seq;
