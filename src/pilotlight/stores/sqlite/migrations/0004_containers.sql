-- Workers that are containers. `container`: how they run, as JSON; NULL where workers are processes.
ALTER TABLE revisions ADD COLUMN container TEXT;
