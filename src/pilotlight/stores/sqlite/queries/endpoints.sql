-- name: insert_endpoint
-- Stores a new endpoint.
INSERT INTO endpoints (
    id, name, version, workers_min, workers_max, idle_timeout_ms, scaler, scaler_value,
    execution_timeout_ms, concurrency, flashboot, created_ms, updated_ms, kind, routing
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: update_endpoint
-- Replaces the settings of an endpoint.
UPDATE endpoints SET
    name = ?, version = ?, workers_min = ?, workers_max = ?, idle_timeout_ms = ?, scaler = ?,
    scaler_value = ?, execution_timeout_ms = ?, concurrency = ?, flashboot = ?, created_ms = ?, updated_ms = ?,
    kind = ?, routing = ?
WHERE id = ?;

-- name: insert_revision
-- Adds a revision of an endpoint.
INSERT INTO revisions (
    endpoint_id, version, model, env, engine_url, gpu_count, memory_bytes, created_ms, command, container
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: endpoint_id_used
-- Whether an id belongs or ever belonged to an endpoint.
SELECT EXISTS (SELECT 1 FROM endpoints WHERE id = ?);

-- name: endpoint_name_used
-- Whether a living endpoint other than the given one has a name.
SELECT EXISTS (SELECT 1 FROM endpoints WHERE name = ? AND deleted_ms IS NULL AND id <> ?);

-- name: current_revision
-- The current revision of a living endpoint.
SELECT
    revisions.endpoint_id, revisions.version, revisions.model, revisions.env, revisions.engine_url,
    revisions.gpu_count, revisions.memory_bytes, revisions.created_ms, revisions.command, revisions.container
FROM endpoints
JOIN revisions ON revisions.endpoint_id = endpoints.id AND revisions.version = endpoints.version
WHERE endpoints.id = ? AND endpoints.deleted_ms IS NULL;

-- name: delete_endpoint
-- Marks a living endpoint as deleted.
UPDATE endpoints SET deleted_ms = ? WHERE id = ? AND deleted_ms IS NULL;

-- name: endpoints
-- All living endpoints with their current revisions, oldest first.
SELECT
    endpoints.id, endpoints.name, endpoints.workers_min, endpoints.workers_max, endpoints.idle_timeout_ms,
    endpoints.scaler, endpoints.scaler_value, endpoints.execution_timeout_ms, endpoints.concurrency,
    endpoints.flashboot, endpoints.created_ms, endpoints.updated_ms, endpoints.kind, endpoints.routing,
    revisions.endpoint_id, revisions.version, revisions.model, revisions.env, revisions.engine_url,
    revisions.gpu_count, revisions.memory_bytes, revisions.created_ms, revisions.command, revisions.container
FROM endpoints
JOIN revisions ON revisions.endpoint_id = endpoints.id AND revisions.version = endpoints.version
WHERE endpoints.deleted_ms IS NULL
ORDER BY endpoints.created_ms, endpoints.seq;

-- name: revisions
-- All revisions of an endpoint, newest first.
SELECT endpoint_id, version, model, env, engine_url, gpu_count, memory_bytes, created_ms, command, container
FROM revisions
WHERE endpoint_id = ?
ORDER BY version DESC;
