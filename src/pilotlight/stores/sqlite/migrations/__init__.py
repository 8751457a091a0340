"""The schema's history. A released migration never changes; the next one is a new pair of files.

`REVISIONS` names all of them, oldest first, so that an up-to-date database is recognised without
importing Alembic. A test compares it with the scripts.
"""

from __future__ import annotations

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008")
