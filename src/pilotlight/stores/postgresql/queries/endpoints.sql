-- name: insert_endpoint
-- Stores a new endpoint.
INSERT INTO endpoints (
    id, name, version, workers_min, workers_max, idle_timeout_ms, scaler, scaler_value,
    execution_timeout_ms, concurrency, flashboot, created_ms, updated_ms, kind, routing
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15);

-- name: update_endpoint
-- Replaces the settings of an endpoint.
UPDATE endpoints SET
    name = $1, version = $2, workers_min = $3, workers_max = $4, idle_timeout_ms = $5, scaler = $6,
    scaler_value = $7, execution_timeout_ms = $8, concurrency = $9, flashboot = $10, created_ms = $11, updated_ms = $12,
    kind = $13, routing = $14
WHERE id = $15;

-- name: insert_revision
-- Adds a revision of an endpoint.
INSERT INTO revisions (
    endpoint_id, version, model, env, engine_url, gpu_count, memory_bytes, created_ms, command, container
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10);

-- name: endpoint_id_used
-- Whether an id belongs or ever belonged to an endpoint.
SELECT EXISTS (SELECT 1 FROM endpoints WHERE id = $1);

-- name: endpoint_name_used
-- Whether a living endpoint other than the given one has a name.
SELECT EXISTS (SELECT 1 FROM endpoints WHERE name = $1 AND deleted_ms IS NULL AND id <> $2);

-- name: current_revision
-- The current revision of a living endpoint.
SELECT
    revisions.endpoint_id, revisions.version, revisions.model, revisions.env, revisions.engine_url,
    revisions.gpu_count, revisions.memory_bytes, revisions.created_ms, revisions.command, revisions.container
FROM endpoints
JOIN revisions ON revisions.endpoint_id = endpoints.id AND revisions.version = endpoints.version
WHERE endpoints.id = $1 AND endpoints.deleted_ms IS NULL;

-- name: delete_endpoint
-- Marks a living endpoint as deleted.
UPDATE endpoints SET deleted_ms = $1 WHERE id = $2 AND deleted_ms IS NULL;

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
WHERE endpoint_id = $1
ORDER BY version DESC;
