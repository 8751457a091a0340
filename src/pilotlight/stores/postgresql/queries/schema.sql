-- name: server
-- What the server is and whether it keeps what it acknowledges.
SELECT
    current_setting('server_version_num')::INTEGER AS version,
    current_setting('server_version') AS version_text,
    current_setting('server_encoding') AS encoding,
    current_setting('fsync') AS fsync,
    current_setting('synchronous_commit') AS synchronous_commit;

-- name: has_versions
-- Whether Alembic has been here.
SELECT to_regclass('alembic_version') IS NOT NULL;

-- name: version
-- The revision of the schema.
SELECT version_num::TEXT FROM alembic_version;
