"""Alembic's scripts, one per migration; each runs the `.sql` file of the same name."""
