-- How the worker of a request is chosen.
ALTER TABLE endpoints ADD COLUMN routing TEXT NOT NULL DEFAULT 'auto';
