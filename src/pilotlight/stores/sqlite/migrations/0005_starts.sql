-- Starts of a worker that has several: thawed or resumed. The table is built anew, for SQLite changes no key in place.

-- One row per start. `stages` is a JSON array of pairs; `decided_ms` is the moment of the first. `memory_bytes`: what
-- the worker held once it was ready; NULL where nobody measured it. `note`: why it came from no better rung.
-- `failure` is JSON.
CREATE TABLE new_starts (
    seq INTEGER PRIMARY KEY,
    worker_id TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    rung TEXT NOT NULL,
    stages TEXT NOT NULL,
    outcome TEXT NOT NULL,
    memory_bytes INTEGER,
    note TEXT NOT NULL,
    failure TEXT,
    decided_ms INTEGER NOT NULL,
    UNIQUE (worker_id, decided_ms)
) STRICT;

-- Until now every start was called cold, and was what is called plain now.
INSERT INTO new_starts (
    seq, worker_id, endpoint_id, version, rung, stages, outcome, note, failure, decided_ms
)
SELECT
    starts.seq, starts.worker_id, starts.endpoint_id, starts.version, 'plain', starts.stages, starts.outcome, '',
    CASE WHEN starts.outcome = 'failed' THEN workers.failure END, starts.decided_ms
FROM starts
LEFT JOIN workers ON workers.id = starts.worker_id
ORDER BY starts.seq;

DROP TABLE starts;
ALTER TABLE new_starts RENAME TO starts;

CREATE INDEX starts_decided ON starts (decided_ms, seq);
CREATE INDEX starts_endpoint ON starts (endpoint_id, decided_ms, seq);

-- Seconds between the comments that a waiting stream gets; NULL for none.
ALTER TABLE api_keys ADD COLUMN heartbeat_s REAL;
