-- Starts of a worker that has several: thawed or resumed. `memory_bytes`: what the worker held once it was ready; NULL
-- where nobody measured it. `note`: why it came from no better rung. `failure` is JSON.
ALTER TABLE starts DROP CONSTRAINT starts_worker_id_key;
ALTER TABLE starts ADD CONSTRAINT starts_worker UNIQUE (worker_id, decided_ms);
ALTER TABLE starts ADD COLUMN memory_bytes BIGINT;
ALTER TABLE starts ADD COLUMN note TEXT NOT NULL DEFAULT '';
ALTER TABLE starts ADD COLUMN failure TEXT;

UPDATE starts SET failure = workers.failure
FROM workers
WHERE workers.id = starts.worker_id AND starts.outcome = 'failed';

-- Until now every start was called cold, and was what is called plain now.
UPDATE starts SET rung = 'plain';

-- Seconds between the comments that a waiting stream gets; NULL for none.
ALTER TABLE api_keys ADD COLUMN heartbeat_s DOUBLE PRECISION;
