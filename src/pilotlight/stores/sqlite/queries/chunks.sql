-- name: job_for_chunk
-- What is needed to accept a chunk: who holds the job, how much nobody has read, the next number.
SELECT seq, status, worker_id, attempt, chunk_bytes, chunks FROM job_records WHERE id = ?;

-- name: count_chunk
-- Marks a job confirmed, and its first output, and counts one more chunk.
UPDATE jobs SET
    confirmed_ms = coalesce(confirmed_ms, ?1),
    first_output_ms = coalesce(first_output_ms, ?1),
    chunks = chunks + 1,
    chunk_bytes = chunk_bytes + ?2
WHERE seq = ?3;

-- name: insert_chunk
-- Stores a chunk for a reader.
INSERT INTO job_chunks (job_seq, attempt, sequence, body) VALUES (?, ?, ?, ?);

-- name: chunks
-- The chunks of a job from one number on, in order.
SELECT sequence, body FROM job_chunks WHERE job_seq = ? AND attempt = ? AND sequence >= ? ORDER BY sequence;

-- name: mark_read
-- Remembers the chunks below a number as returned to a reader, so many bytes.
UPDATE jobs SET chunk_read = 1, chunks_read = ?, chunk_bytes = chunk_bytes - ? WHERE seq = ?;

-- name: mark_unread
-- Takes back that chunks from a number on were returned, if none but those below another number were.
UPDATE jobs SET
    chunks_read = ?1,
    chunk_bytes = (
        SELECT coalesce(sum(length(body)), 0) FROM job_chunks
        WHERE job_chunks.job_seq = jobs.seq AND job_chunks.attempt = jobs.attempt AND job_chunks.sequence >= ?1
    )
WHERE id = ?2 AND attempt = ?3 AND chunks_read = ?4;

-- name: mark_seen
-- Remembers only that some chunk has reached a reader.
UPDATE jobs SET chunk_read = 1 WHERE seq = ?;

-- name: drop_chunks
-- Forgets all chunks of a job.
DELETE FROM job_chunks WHERE job_seq = ?;

-- name: trim_chunks
-- Forgets the oldest chunks of a job that were returned.
DELETE FROM job_chunks WHERE (job_seq, attempt, sequence) IN (
    SELECT job_chunks.job_seq, job_chunks.attempt, job_chunks.sequence
    FROM job_records
    JOIN job_chunks ON job_chunks.job_seq = job_records.seq AND job_chunks.attempt = job_records.attempt
    WHERE job_records.id = ? AND job_chunks.sequence < job_records.chunks_read
    ORDER BY job_chunks.sequence
    LIMIT ?
);

-- name: restart_chunks
-- Lets the chunks of a job, which has none now, go on with the next number.
UPDATE jobs SET chunks_read = chunks, chunk_bytes = 0 WHERE seq = ?;

-- name: has_chunks
-- Whether a job has chunks that were not returned before, or any from a number on.
SELECT EXISTS (
    SELECT 1 FROM job_records
    JOIN job_chunks
        ON job_chunks.job_seq = job_records.seq AND job_chunks.attempt = job_records.attempt
        AND job_chunks.sequence >= coalesce(?2, job_records.chunks_read)
    WHERE job_records.id = ?1
);
