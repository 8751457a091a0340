-- Jobs that were never handed out are served in the order of their submission, whatever the clock says: it may be
-- set back, and gateways that share a queue have one each. `place`: what orders the jobs of one rank, before `seq`.
ALTER TABLE jobs ADD COLUMN place INTEGER NOT NULL GENERATED ALWAYS AS (
    CASE WHEN attempt = 0 THEN 0 ELSE queued_ms END
) VIRTUAL;

DROP INDEX jobs_queue;

-- The queue in the order of service; holds what a take, and a count of those that wait too long, has to look at.
CREATE INDEX jobs_queue ON jobs (endpoint_id, purges, rank, place, seq, queued_ms, expires_ms)
WHERE status = 'IN_QUEUE';
