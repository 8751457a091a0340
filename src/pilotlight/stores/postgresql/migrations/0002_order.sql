-- Jobs that were never handed out are served in the order of their submission, whatever the clock says: it may be
-- set back, and gateways that share a queue have one each. `place`: what orders the jobs of one rank, before `seq`.
ALTER TABLE jobs ADD COLUMN place BIGINT NOT NULL GENERATED ALWAYS AS (
    CASE WHEN attempt = 0 THEN 0 ELSE queued_ms END
) STORED;

DROP INDEX jobs_queue;

-- The queue in the order of service, one life after the other, so that what was purged is not even passed by; with
-- the end of each job's time, so that what has none left is passed by within the index.
CREATE INDEX jobs_queue ON jobs (endpoint_id, epoch, rank, place, seq, queued_ms, expires_ms)
WHERE status = 'IN_QUEUE';
