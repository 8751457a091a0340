-- name: job_for_chunk
-- What is needed to accept a chunk: who holds the job, and the number of the next chunk.
SELECT seq, status, worker_id, chunks FROM jobs WHERE id = ?;

-- name: count_chunk
-- Marks a job confirmed and counts one more chunk.
UPDATE jobs SET confirmed = 1, chunks = chunks + 1 WHERE seq = ?;

-- name: insert_chunk
-- Stores a chunk for a reader.
INSERT INTO job_chunks (job_seq, sequence, body) VALUES (?, ?, ?);

-- name: chunks
-- The chunks of a job that nobody has read, in order.
SELECT sequence, body FROM job_chunks WHERE job_seq = ? ORDER BY sequence;

-- name: delete_chunks_through
-- Forgets the chunks of a job up to one number.
DELETE FROM job_chunks WHERE job_seq = ? AND sequence <= ?;

-- name: delete_chunks
-- Forgets all chunks of a job.
DELETE FROM job_chunks WHERE job_seq = ?;

-- name: has_chunks
-- Whether a job has chunks that nobody has read.
SELECT EXISTS (SELECT 1 FROM job_chunks WHERE job_seq = (SELECT seq FROM jobs WHERE id = ?));
