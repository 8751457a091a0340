-- name: insert_request_segment
-- Appends requests of one endpoint.
INSERT INTO request_segments (endpoint_id, last_ms, records, data)
VALUES (?, ?, ?, ?);

-- name: request_segments
-- Requests of all endpoints, those that arrived last first.
SELECT last_ms, data
FROM request_segments
ORDER BY last_ms DESC, seq DESC;

-- name: request_segments_of_endpoint
-- Requests of one endpoint, those that arrived last first.
SELECT last_ms, data
FROM request_segments
WHERE endpoint_id = ?
ORDER BY last_ms DESC, seq DESC;

-- name: count_requests
-- How many there are.
SELECT coalesce(sum(records), 0)
FROM request_segments;

-- name: oldest_request_segments
-- Segments and the number of their requests, oldest first.
SELECT seq, records
FROM request_segments
ORDER BY last_ms, seq;

-- name: newest_request_segments
-- The requests of the segments that were written last.
SELECT data
FROM request_segments
ORDER BY seq DESC
LIMIT ?;

-- name: request_segment
-- The requests of one segment.
SELECT data
FROM request_segments
WHERE seq = ?;

-- name: change_request_segment
-- Puts others into a segment.
UPDATE request_segments
SET last_ms = ?, records = ?, data = ?
WHERE seq = ?;

-- name: delete_request_segment
-- Forgets a segment.
DELETE FROM request_segments
WHERE seq = ?;
