-- name: append_chunk
-- Stores a chunk of the running attempt if there is room for it, and counts it.
WITH accepted AS (
    UPDATE jobs SET
        confirmed_ms = coalesce(confirmed_ms, $4),
        first_output_ms = coalesce(first_output_ms, $4),
        chunks = chunks + 1,
        unread_bytes = unread_bytes + length($5::BYTEA)
    WHERE id = $1
        AND status = 'IN_PROGRESS'
        AND worker_id = $2
        AND ($3::INTEGER IS NULL OR attempt = $3)
        AND unread_bytes + length($5::BYTEA) <= $6
    RETURNING seq, attempt, chunks - 1 AS sequence
)
INSERT INTO job_chunks (job_seq, attempt, sequence, body, writer)
SELECT seq, attempt, sequence, $5, $7 FROM accepted;

-- name: hold_job
-- Waits for whoever is changing a job, and keeps it from changing.
SELECT seq FROM jobs WHERE id = $1 FOR SHARE;

-- name: chunk_of
-- Whether a call has stored its chunk.
SELECT EXISTS (SELECT 1 FROM job_chunks WHERE job_seq = $1 AND writer = $2);

-- name: chunks
-- Chunks of an attempt from a number on, in order, as many as fit into a number of bytes, but at least one.
SELECT sequence, body FROM (
    SELECT
        sequence, body, sum(length(body)) OVER (ORDER BY sequence) AS bytes,
        row_number() OVER (ORDER BY sequence) AS place
    FROM job_chunks
    WHERE job_seq = $1 AND attempt = $2 AND sequence >= $3
) AS waiting
WHERE bytes <= $4 OR place = 1
ORDER BY sequence;

-- name: job_with_news
-- One job, and whether it has chunks that were not drained, or any from a number on.
SELECT
    job_records.*,
    EXISTS (
        SELECT 1 FROM job_chunks
        WHERE job_chunks.job_seq = job_records.seq
            AND job_chunks.attempt = job_records.attempt
            AND job_chunks.sequence >= coalesce($2::INTEGER, job_records.chunks_read)
    ) AS news
FROM job_records
WHERE id = $1;

-- name: mark_drained
-- Remembers the last chunk that was drained, and that the stream has a reader.
UPDATE jobs SET chunk_read = TRUE, chunks_read = $2, unread_bytes = unread_bytes - $3 WHERE seq = $1;

-- name: mark_unread
-- Takes back that chunks from a number on were drained, if none but those below another number were.
UPDATE jobs SET
    chunks_read = $1,
    unread_bytes = (
        SELECT coalesce(sum(length(body)), 0) FROM job_chunks
        WHERE job_chunks.job_seq = jobs.seq AND job_chunks.attempt = jobs.attempt AND job_chunks.sequence >= $1
    )
WHERE id = $2 AND attempt = $3 AND chunks_read = $4;

-- name: trim_chunks
-- Forgets the oldest chunks of a job that were drained.
DELETE FROM job_chunks
USING (
    SELECT job_chunks.job_seq, job_chunks.attempt, job_chunks.sequence
    FROM job_records
    JOIN job_chunks ON job_chunks.job_seq = job_records.seq AND job_chunks.attempt = job_records.attempt
    WHERE job_records.id = $1 AND job_chunks.sequence < job_records.chunks_read
    ORDER BY job_chunks.sequence
    LIMIT $2
) AS old
WHERE job_chunks.job_seq = old.job_seq
    AND job_chunks.attempt = old.attempt
    AND job_chunks.sequence = old.sequence;

-- name: chunks_read
-- How far a job's chunks have been drained.
SELECT chunk_read, chunks_read FROM jobs WHERE seq = $1;

-- name: mark_read
-- Remembers that the stream has a reader.
UPDATE jobs SET chunk_read = TRUE WHERE seq = $1 AND NOT chunk_read;
