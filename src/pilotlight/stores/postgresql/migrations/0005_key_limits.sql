-- How much of a crowded endpoint a key gets beside others.
ALTER TABLE api_keys ADD COLUMN priority TEXT NOT NULL DEFAULT 'normal';

-- What a key may ask for; NULL for no limit.
ALTER TABLE api_keys ADD COLUMN requests_per_minute BIGINT;
ALTER TABLE api_keys ADD COLUMN tokens_per_minute BIGINT;
ALTER TABLE api_keys ADD COLUMN concurrent_max BIGINT;
