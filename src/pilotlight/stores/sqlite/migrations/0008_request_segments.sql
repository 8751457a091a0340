-- The request log in segments: requests of one endpoint that were written at a time, as a JSON array of arrays
-- in the order of the columns of the view below. As a row of its own, with three indexes, a request took four
-- times the time of the processor.
CREATE TABLE request_segments (
    seq INTEGER PRIMARY KEY,
    endpoint_id TEXT NOT NULL,
    last_ms INTEGER NOT NULL,
    records INTEGER NOT NULL,
    data TEXT NOT NULL
) STRICT;

CREATE INDEX request_segments_last ON request_segments (last_ms, seq, records);
CREATE INDEX request_segments_endpoint ON request_segments (endpoint_id, last_ms, seq);

INSERT INTO request_segments (endpoint_id, last_ms, records, data)
SELECT
    endpoint_id, max(arrival_ms), count(*),
    json_group_array(
        json_array(
            id, road, endpoint_id, key_id, worker_id, route, status, outcome, arrival_ms, wait_ms,
            first_token_ms, duration_ms, tokens_in, tokens_out, estimated
        )
    )
FROM (
    SELECT *, (row_number() OVER (PARTITION BY endpoint_id ORDER BY arrival_ms, seq) - 1) / 500 AS segment
    FROM requests
    ORDER BY endpoint_id, arrival_ms, seq
)
GROUP BY endpoint_id, segment
ORDER BY max(arrival_ms);

DROP TABLE requests;

-- For who looks into the database by hand.
CREATE VIEW requests AS
SELECT
    json_extract(value, '$[0]') AS id,
    json_extract(value, '$[1]') AS road,
    json_extract(value, '$[2]') AS endpoint_id,
    json_extract(value, '$[3]') AS key_id,
    json_extract(value, '$[4]') AS worker_id,
    json_extract(value, '$[5]') AS route,
    json_extract(value, '$[6]') AS status,
    json_extract(value, '$[7]') AS outcome,
    json_extract(value, '$[8]') AS arrival_ms,
    json_extract(value, '$[9]') AS wait_ms,
    json_extract(value, '$[10]') AS first_token_ms,
    json_extract(value, '$[11]') AS duration_ms,
    json_extract(value, '$[12]') AS tokens_in,
    json_extract(value, '$[13]') AS tokens_out,
    json_extract(value, '$[14]') AS estimated
FROM request_segments, json_each(data);
